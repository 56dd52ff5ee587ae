package host

import (
	"errors"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// agreementActions are actions on the system.
var agreementActions = []oem.Action{
	{
		Name: "ObeyOrder", Bound: "ComputerSystem.v1_0_0.OemActions",
		Description: "Has the agent carry out an order about the access agreement. Anybody who can log in may bring one; who may give it, the signatures decide.",
		Parameters: []oem.Parameter{
			{Name: "Document", Type: "Edm.String", Required: true, Description: "The signed order, a JSON document."},
		},
	},
	{
		Name: "OfferAgreement", Bound: "ComputerSystem.v1_0_0.OemActions",
		Description: "Has the agent take an access agreement. While another one holds, it must be its successor, and signed as such.",
		Parameters: []oem.Parameter{
			{Name: "Document", Type: "Edm.String", Required: true, Description: "The signed agreement, a JSON document."},
		},
	},
}

// maxAgreement bounds a document in bytes, as package access does.
const maxAgreement = 64 << 10

func (h *host) agreementAction(name, title string, do func(document, caller string) error) service.Action {
	full := "BackdoorComputerSystem." + name
	return service.Action{
		Name: full, OEM: true, Title: title,
		Privileges: service.Privileges{{service.Login}},
		Parameters: []service.Property{{Name: "Document", Kind: service.String, Required: true, Min: 1, Max: maxAgreement}},
		Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
			err := do(v.String("Document"), r.Caller.User)
			switch {
			case err == nil:
				return nil, nil
			case errors.Is(err, access.ErrInvalid):
				return nil, service.Because(400, "ActionParameterValueFormatError", sentence(err), "Document", "Document", full)
			case errors.Is(err, access.ErrUnsigned), errors.Is(err, access.ErrDenied), errors.Is(err, access.ErrLocked):
				return nil, service.Because(403, "InsufficientPrivilege", sentence(err))
			}
			return nil, refusal(err)
		},
	}
}

func (h *host) obey(document, caller string) error {
	o, err := access.ParseOrder(strings.NewReader(document))
	if err != nil {
		return err
	}
	return h.o.Agent.Obey(o, caller)
}

func (h *host) offer(document, caller string) error {
	a, err := access.Parse(strings.NewReader(document))
	if err != nil {
		return err
	}
	return h.o.Agent.Offer(a, caller)
}
