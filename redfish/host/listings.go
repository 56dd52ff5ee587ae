package host

import (
	"errors"

	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// listed is a listing of package query as a resource of ours: GET …/Systems/system/Oem/dev_backdoor/Modules and so on.
type listed struct {
	listing query.Listing
	schema  oem.Schema
	answer  func(query.Answer) schema.Object
}

// listingResource is the resource of a listing whose answer is an A.
type listingResource[A query.Answer] struct {
	schema.Resource
	Answer oem.Value[A] `doc:"What was found in the host's memory, and how far that can be trusted."`
}

const listingURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/"

func listingLink(resource string) *schema.Link { return schema.LinkTo(listingURI + resource) }

// listings are those that agents serve.
func listings() []listed {
	return []listed{
		list[query.Modules]("lsmod"),
		list[query.Interfaces]("ip"),
		list[query.OpenFiles]("lsof"),
		list[query.Mounts]("mount"),
		list[query.Sockets]("ss"),
		list[query.SlabCaches]("slabtop"),
		list[query.Memory]("vmstat"),
		list[query.MemoryErrors]("edac"),
		list[query.Pstore]("pstore"),
		list[query.PCI]("lspci"),
		list[query.Protections]("protections"),
		list[query.RunQueues]("load"),
		list[query.Cgroups]("cgroups"),
		list[query.Containers]("containers"),
		list[query.Locks]("locks"),
		list[query.WorkerPools]("workqueues"),
		list[query.Disks]("disks"),
		list[query.BPF]("bpf"),
		list[query.Probes]("probes"),
		list[query.Host]("about"),
		list[query.RCU]("rcu"),
	}
}

// list finds a listing by its name and gives it the resource for its answer.
func list[A query.Answer](name string) listed {
	var l listed
	for _, q := range query.Listings() {
		if q.Name == name {
			l.listing = q
		}
	}
	q := l.listing
	l.schema = oem.Schema{
		Name: "Backdoor" + q.Resource, Version: "v1_0_0", Purpose: sentenceOf(q.Short), Resource: listingResource[A]{},
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/" + q.Resource},
	}
	l.answer = func(a query.Answer) schema.Object {
		return &listingResource[A]{Resource: schema.Resource{Name: sentenceOf(q.Short)}, Answer: oem.Value[A]{V: a.(A)}}
	}
	return l
}

// sentenceOf makes a sentence of what a verb's help says of it.
func sentenceOf(short string) string { return sentence(errors.New(short)) }

func (h *host) listingResources() (routes []service.Route) {
	for _, l := range listings() {
		routes = append(routes, service.Route{
			URI:  listingURI + l.listing.Resource,
			Type: l.schema.Type(l.schema.Name),
			Get: func(r *service.Request) (schema.Object, error) {
				v, err := h.o.Agent.View(r.Context())
				if err != nil {
					return nil, refusal(err)
				}
				a, err := l.listing.Ask(r.Context(), v, nil)
				if err != nil {
					return nil, refusal(err)
				}
				return l.answer(a), nil
			},
		})
	}
	return routes
}
