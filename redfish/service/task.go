package service

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// tasks keeps the tasks of the service, the running ones and a bounded number of those that ended.
type tasks struct {
	svc *Service

	mu   sync.Mutex // guards what follows
	next int
	byID map[string]*Task
}

// Task is an operation that goes on after its request was answered. Its work reports by it.
type Task struct {
	id     string
	seq    int
	user   string
	cancel context.CancelFunc
	all    *tasks
	done   chan struct{}

	// guarded by all.mu
	view  schema.Task
	reply *Reply
	err   error
}

func newTasks(s *Service) *tasks { return &tasks{svc: s, next: 1, byID: map[string]*Task{}} }

const tasksURI = "/redfish/v1/TaskService/Tasks"

// Task starts work that takes long and returns the answer that leads the client to it: 202, with the task as its body and the task
// monitor as its Location. The work's context ends when the client cancels the task; its Reply or error is what the monitor
// answers in the end, and its error also ends the task as an exception.
func (r *Request) Task(name string, work func(context.Context, *Task) (*Reply, error)) (*Reply, error) {
	s := r.svc
	t := &Task{user: r.Caller.User, all: s.tasks, done: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.ctx))
	t.cancel = cancel
	if err := s.tasks.add(t); err != nil {
		cancel()
		return nil, err
	}
	zero := 0
	t.set(func(v *schema.Task) {
		*v = schema.Task{
			Resource:  schema.Resource{Name: name},
			TaskState: schema.TaskRunning, TaskStatus: schema.HealthOK, StartTime: schema.Time(s.now()), PercentComplete: &zero,
			TaskMonitor: t.monitor(), Messages: []schema.Message{},
			Payload: &schema.TaskPayload{TargetURI: r.http.URL.Path, HTTPOperation: r.http.Method, HTTPHeaders: []string{}, JSONBody: payload(r.body, s.limits.Depth)},
		}
	})
	s.Publish(Event{MessageID: taskEvent + "TaskStarted", Args: []string{t.id}, Origin: t.uri()})
	go t.run(ctx, work)
	return &Reply{Status: http.StatusAccepted, Location: t.monitor(), Body: t.snapshot(), Header: http.Header{"Retry-After": {"1"}}}, nil
}

// payload is a request's body for a task to show, without what is secret in it.
func payload(body []byte, depth int) string {
	shown := redact(body, depth)
	for _, v := range shown {
		if v == redacted {
			b, err := json.Marshal(shown)
			if err != nil {
				return ""
			}
			return string(b)
		}
	}
	return string(body)
}

func (t *Task) uri() string     { return tasksURI + "/" + t.id }
func (t *Task) monitor() string { return t.uri() + "/Monitor" }

// add gives a task its Id. The oldest task that has ended makes room.
func (t *tasks) add(task *Task) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byID) >= t.svc.limits.Tasks {
		var oldest *Task
		for _, o := range t.byID {
			if o.view.TaskState.Done() && (oldest == nil || o.seq < oldest.seq) {
				oldest = o
			}
		}
		if oldest == nil {
			return Because(503, "ServiceTemporarilyUnavailable", "As many tasks are running as the service can take. Retry in 30 seconds.", "30")
		}
		delete(t.byID, oldest.id)
	}
	task.id, task.seq = strconv.Itoa(t.next), t.next
	t.next++
	t.byID[task.id] = task
	return nil
}

func (t *tasks) get(id string) *Task {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id]
}

func (t *tasks) list() []*Task {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*Task
	for _, task := range t.byID {
		all = append(all, task)
	}
	slices.SortFunc(all, func(a, b *Task) int { return cmp.Compare(a.seq, b.seq) })
	return all
}

func (t *Task) run(ctx context.Context, work func(context.Context, *Task) (*Reply, error)) {
	defer close(t.done)
	defer t.cancel()
	s := t.all.svc
	reply, err := t.safely(ctx, work)
	t.set(func(v *schema.Task) {
		t.reply, t.err = reply, err
		v.EndTime = schema.Time(s.now())
		hundred := 100
		v.PercentComplete = &hundred
		var e *Error
		switch {
		case err == nil:
			v.TaskState = schema.TaskCompleted
			if len(v.Messages) == 0 {
				v.Messages = append(v.Messages, message("Success"))
			}
		case ctx.Err() != nil:
			v.TaskState, v.TaskStatus = schema.TaskCancelled, schema.HealthWarning
		case errors.As(err, &e):
			v.TaskState, v.TaskStatus = schema.TaskException, schema.HealthCritical
			v.Messages = append(v.Messages, e.Messages...)
		default:
			v.TaskState, v.TaskStatus = schema.TaskException, schema.HealthCritical
			v.Messages = append(v.Messages, message("InternalError"))
		}
	})
	ended := map[schema.TaskState]string{schema.TaskCompleted: "TaskCompletedOK", schema.TaskCancelled: "TaskCancelled", schema.TaskException: "TaskAborted"}
	s.Publish(Event{MessageID: taskEvent + ended[t.snapshot().TaskState], Args: []string{t.id}, Origin: t.uri()})
	if err != nil {
		s.log.Warn("task ended", "task", t.id, "err", err)
	}
}

// safely runs the work, and takes a panic of it for an error.
func (t *Task) safely(ctx context.Context, work func(context.Context, *Task) (*Reply, error)) (reply *Reply, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("task panicked: %v", p)
		}
	}()
	return work(ctx, t)
}

func (t *Task) set(f func(*schema.Task)) {
	t.all.mu.Lock()
	defer t.all.mu.Unlock()
	f(&t.view)
}

// Progress tells the client how far the work is, in percent, and, unless empty, what is being done.
func (t *Task) Progress(percent int, doing string) {
	t.set(func(v *schema.Task) {
		percent = max(0, min(percent, 99))
		v.PercentComplete = &percent
		const enough = 50
		if doing != "" && len(v.Messages) < enough {
			m := message("Success")
			m.Message, m.Resolution = doing, "None."
			v.Messages = append(v.Messages, m)
		}
	})
}

// Report tells the client how far the work is, in percent, and, unless id is empty, what is being done, by a message of DMTF's Update
// registry, which is also sent as an event.
func (t *Task) Report(percent int, id string, args ...string) {
	t.Progress(percent, "")
	if id == "" {
		return
	}
	m := updateMessage(id, args...)
	t.set(func(v *schema.Task) {
		const enough = 50
		if len(v.Messages) < enough {
			v.Messages = append(v.Messages, m)
		}
	})
	t.all.svc.Publish(Event{MessageID: m.MessageID, Args: m.MessageArgs, Origin: t.uri()})
}

// SetOEM puts an object under Oem in the task, for results that have no other home.
func (t *Task) SetOEM(identifier string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode result of task: %w", err)
	}
	t.set(func(v *schema.Task) {
		// A new map: snapshots share the old one.
		oem := schema.OEM{identifier: raw}
		for k, o := range v.OEM {
			if k != identifier {
				oem[k] = o
			}
		}
		v.OEM = oem
	})
	return nil
}

// snapshot returns the task as a resource with its URI.
func (t *Task) snapshot() *schema.Task {
	t.all.mu.Lock()
	defer t.all.mu.Unlock()
	v := t.view
	v.Messages = slices.Clone(v.Messages)
	v.ID, v.ODataID, v.ODataType = t.id, t.uri(), "#"+schema.TypeTask
	return &v
}

// visible reports whether a caller may see and cancel a task: its own, or any for a manager's administrator.
func (t *Task) visible(c Caller) bool { return t.user == c.User || c.may(ConfigureManager) }

// answer is what the monitor says.
func (t *Task) answer() (*Reply, error) {
	view := t.snapshot()
	if !view.TaskState.Done() {
		return &Reply{Status: http.StatusAccepted, Location: t.monitor(), Body: view, Header: http.Header{"Retry-After": {"1"}}}, nil
	}
	t.all.mu.Lock()
	reply, err := t.reply, t.err
	t.all.mu.Unlock()
	var e *Error
	switch {
	case errors.As(err, &e) && !errors.Is(err, context.Canceled):
		return nil, e
	case err != nil && view.TaskState == schema.TaskException:
		return nil, refuse(500, "InternalError")
	case err != nil || reply == nil:
		return &Reply{Body: view}, nil
	}
	out := *reply
	if out.Body == nil {
		out.Body = view
	}
	return &out, nil
}

func (s *Service) taskRoutes() []Route {
	find := func(r *Request) (*Task, error) {
		t := s.tasks.get(r.Param("task"))
		if t == nil {
			return nil, ErrNotFound
		}
		return t, nil
	}
	cancel := func(r *Request) error {
		t, err := find(r)
		if err != nil {
			return err
		}
		if !t.visible(r.Caller) {
			return refuse(403, "InsufficientPrivilege")
		}
		t.cancel()
		select {
		case <-t.done:
			s.tasks.mu.Lock()
			delete(s.tasks.byID, t.id)
			s.tasks.mu.Unlock()
		case <-time.After(2 * time.Second):
			t.set(func(v *schema.Task) {
				if !v.TaskState.Done() {
					v.TaskState = schema.TaskCancelling
				}
			})
		}
		return nil
	}
	return []Route{
		{
			URI:  "/redfish/v1/TaskService",
			Type: schema.TypeTaskService,
			Get: func(*Request) (schema.Object, error) {
				return &schema.TaskService{
					Resource: schema.Resource{Name: "Task Service"}, ServiceEnabled: true, CompletedTaskOverWritePolicy: "Oldest",
					DateTime: schema.Time(s.now()), LifeCycleEventOnTaskStateChange: true,
					Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK}, Tasks: schema.LinkTo(tasksURI),
				}, nil
			},
		},
		{
			URI: tasksURI, Type: schema.TypeTaskCollection, Name: "Tasks",
			Members: func(r *Request) (ids []string, err error) {
				for _, t := range s.tasks.list() {
					ids = append(ids, t.id)
				}
				return ids, nil
			},
		},
		{
			URI: tasksURI + "/{task}", Type: schema.TypeTask,
			Get: func(r *Request) (schema.Object, error) {
				t, err := find(r)
				if err != nil {
					return nil, err
				}
				return t.snapshot(), nil
			},
			Delete: cancel,
		},
		{
			URI: tasksURI + "/{task}/Monitor", Type: schema.TypeTask,
			Handler: func(r *Request) (*Reply, error) {
				t, err := find(r)
				if err != nil {
					return nil, err
				}
				return t.answer()
			},
			Delete: cancel,
		},
	}
}
