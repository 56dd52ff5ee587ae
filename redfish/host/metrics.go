package host

import (
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// telemetry is what the agent reports of its host, of itself and of the machine that it runs on. All of it can be read at any
// time where each metric says; a metric without a value at the moment, the host's while its kernel is not attached for one, is
// left out of a report.
func telemetry() service.Telemetry {
	const (
		diagnostics = managerURI + "/ManagerDiagnosticData#/"
		engine      = stateURI + "#/State/"
		memory      = listingURI + "Memory#/Answer/"
		load        = listingURI + "Load#/Answer/Averages/"
		bytes       = "By"
	)
	return service.Telemetry{
		Metrics: []service.Metric{
			{ID: "AgentMemoryAvailable", Name: "Memory available to the agent's machine", Units: bytes, Property: diagnostics + "MemoryStatistics/AvailableBytes"},
			{ID: "AgentMemoryUsed", Name: "Memory used on the agent's machine", Units: bytes, Property: diagnostics + "MemoryStatistics/UsedBytes"},
			{ID: "AgentResident", Name: "Memory of the largest process of the agent's machine, which is the agent", Units: bytes, Property: diagnostics + "TopProcesses/0/ResidentSetSizeBytes"},
			{ID: "AgentCPUUser", Name: "Share of the agent's CPUs in programs", Decimal: true, Units: "%", Property: diagnostics + "ProcessorStatistics/UserPercent"},
			{ID: "AgentCPUKernel", Name: "Share of the agent's CPUs in the kernel", Decimal: true, Units: "%", Property: diagnostics + "ProcessorStatistics/KernelPercent"},
			{ID: "AgentStorageFree", Name: "Storage free on the agent's machine", Units: "KiBy", Property: diagnostics + "FreeStorageSpaceKiB"},
			{ID: "AgentUptime", Name: "Time since the agent started", Counter: true, Units: "s", Property: diagnostics + "ServiceRootUptimeSeconds"},
			{ID: "EngineAttaches", Name: "Kernels that the agent attached to", Counter: true, Property: engine + "Attaches"},
			{ID: "EnginePasses", Name: "Passes over the host's memory", Counter: true, Property: engine + "Passes"},
			{ID: "EngineReads", Name: "Accesses to the host's memory", Counter: true, Property: engine + "LastPass/Reads"},
			{ID: "EngineBytes", Name: "Bytes read from the host's memory", Counter: true, Units: bytes, Property: engine + "LastPass/Bytes"},
			{ID: "EngineLoad", Name: "Share of a processor that looks at the host take", Decimal: true, Property: engine + "LastPass/Load"},
			{ID: "EngineLate", Name: "Passes that began late", Counter: true, Property: engine + "LastPass/Late"},
			{ID: "RDMADropped", Name: "RDMA packets dropped", Counter: true, Property: rdmaURI + "#/RDMA/Dropped"},
			{ID: "RDMARefused", Name: "RDMA requests refused", Counter: true, Property: rdmaURI + "#/RDMA/Refused"},
			{ID: "RDMAStores", Name: "Stores to the host's memory by RDMA", Counter: true, Property: rdmaURI + "#/RDMA/Stores"},
			{ID: "HostFindingsOpen", Name: "Faults of the host that are open", Property: systemURI + "#/Oem/dev_backdoor/OpenFindings"},
			{ID: "HostMemoryFree", Name: "Free memory of the host", Units: bytes, Property: memory + "Free"},
			{ID: "HostMemoryAvailable", Name: "Memory of the host that programs could get", Units: bytes, Property: memory + "Available"},
			{ID: "HostMemoryAnonymous", Name: "Memory of the host's programs", Units: bytes, Property: memory + "Anonymous"},
			{ID: "HostMemorySlab", Name: "Memory of the host's kernel objects", Units: bytes, Property: memory + "Slab"},
			{ID: "HostSwapFree", Name: "Free swap of the host", Units: bytes, Property: memory + "SwapFree"},
			{ID: "HostLoad1", Name: "Load average of the host over 1 minute", Decimal: true, Property: load + "0"},
			{ID: "HostLoad5", Name: "Load average of the host over 5 minutes", Decimal: true, Property: load + "1"},
			{ID: "HostLoad15", Name: "Load average of the host over 15 minutes", Decimal: true, Property: load + "2"},
		},
		Reports: []service.Report{
			{ID: "Agent", Name: "The agent and its machine", Every: time.Minute, Metrics: []string{
				"AgentMemoryAvailable", "AgentMemoryUsed", "AgentResident", "AgentCPUUser", "AgentCPUKernel", "AgentStorageFree", "AgentUptime",
				"EngineAttaches", "EnginePasses", "EngineReads", "EngineBytes", "EngineLoad", "EngineLate",
				"RDMADropped", "RDMARefused", "RDMAStores",
			}},
			{ID: "Host", Name: "The host, as its memory tells", Every: time.Minute, Metrics: []string{
				"HostFindingsOpen", "HostMemoryFree", "HostMemoryAvailable", "HostMemoryAnonymous", "HostMemorySlab", "HostSwapFree", "HostLoad1", "HostLoad5", "HostLoad15",
			}},
		},
		Triggers: []service.Trigger{
			{ID: "AgentMemory", Name: "The agent's machine runs out of memory", Metrics: []string{"AgentMemoryAvailable"}, Thresholds: map[string]float64{"LowerWarning": 32 << 20, "LowerCritical": 8 << 20}},
		},
	}
}
