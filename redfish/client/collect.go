package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// DumpURI is the log service of diagnostic data that was collected from the host.
const DumpURI = "/redfish/v1/Systems/system/LogServices/Dump"

// CollectLog has the host's kernel log collected, and waits for it: the entry's AdditionalDataURI is where it is downloaded.
func (c *Client) CollectLog(ctx context.Context, progress func(schema.Task)) (*schema.LogEntry, error) {
	return c.collect(ctx, "#LogService.CollectDiagnosticData", map[string]any{"DiagnosticDataType": "OEM", "OEMDiagnosticDataType": "Dmesg"}, progress)
}

// CollectCore has a core of the host's memory (vmcore) laid out, and waits for it. Its bytes are read from the host while it is downloaded. It takes the
// privilege BackdoorMemory.
func (c *Client) CollectCore(ctx context.Context, progress func(schema.Task)) (*schema.LogEntry, error) {
	return c.collect(ctx, "#LogService.CollectDiagnosticData", map[string]any{"DiagnosticDataType": "OS"}, progress)
}

// CollectMemory has a range of the host's RAM collected, and waits for it.
func (c *Client) CollectMemory(ctx context.Context, start uint64, length int64, progress func(schema.Task)) (*schema.LogEntry, error) {
	return c.collect(ctx, "#BackdoorLogService.CollectMemoryRange", map[string]any{"Start": fmt.Sprintf("%#x", start), "Length": length}, progress)
}

// CollectRecording has the series of samples collected by which a finding was judged, and waits for it; of no finding, the series as it is.
func (c *Client) CollectRecording(ctx context.Context, finding string, progress func(schema.Task)) (*schema.LogEntry, error) {
	if finding == "" {
		return c.collect(ctx, "#LogService.CollectDiagnosticData", map[string]any{"DiagnosticDataType": "OEM", "OEMDiagnosticDataType": "Recording"}, progress)
	}
	return c.collect(ctx, "#BackdoorLogService.CollectRecording", map[string]any{"Finding": finding}, progress)
}

func (c *Client) collect(ctx context.Context, name string, in any, progress func(schema.Task)) (*schema.LogEntry, error) {
	var log schema.LogService
	if err := c.Get(ctx, DumpURI, &log); err != nil {
		return nil, err
	}
	action, ok := log.Actions[name]
	if !ok {
		return nil, errors.New("the service does not collect that")
	}
	task, err := c.Run(ctx, action.Target, in, nil, progress)
	if err != nil {
		return nil, err
	}
	if task == nil || task.TaskMonitor == "" {
		return nil, errors.New("the service has not made a task of it")
	}
	// The monitor of a task that has ended answers as the action would have.
	resp, err := c.Do(ctx, http.MethodGet, task.TaskMonitor, nil, nil)
	if err != nil {
		return nil, err
	}
	if resp.Location == "" {
		return nil, errors.New("the service does not say where the data is")
	}
	var entry schema.LogEntry
	if err := c.Get(ctx, resp.Location, &entry); err != nil {
		return nil, err
	}
	return &entry, nil
}
