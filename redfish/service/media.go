package service

import (
	"slices"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

const bmcMediaURI = "/redfish/v1/Systems/system/VirtualMedia"

// mediaRoutes are the virtual drives of a BMC.
func mediaRoutes(m Media) []Route {
	has := func(r *Request) (string, error) {
		if id := r.Param("drive"); slices.Contains(m.Drives(), id) {
			return id, nil
		}
		return "", ErrNotFound
	}
	return []Route{
		{
			URI: bmcMediaURI, Type: schema.TypeVirtualMediaCollection, Name: "Virtual Media",
			Members: func(*Request) ([]string, error) { return m.Drives(), nil },
		},
		{
			URI: bmcMediaURI + "/{drive}", Type: schema.TypeVirtualMedia,
			Get: func(r *Request) (schema.Object, error) {
				id, err := has(r)
				if err != nil {
					return nil, err
				}
				image := m.Image(id)
				in, protected := image != "", true
				out := &schema.VirtualMedia{
					Resource: schema.Resource{Name: "Virtual drive " + id}, MediaTypes: []string{"CD", "DVD"},
					Inserted: &in, WriteProtected: &protected, ConnectedVia: "NotConnected",
				}
				if in {
					out.Image, out.ConnectedVia = &image, "URI"
				}
				return out, nil
			},
			Actions: []Action{
				{
					Name: "VirtualMedia.InsertMedia",
					Parameters: []Property{
						{Name: "Image", Kind: String, Required: true, Min: 1, Max: 2048},
						{Name: "Inserted", Kind: Boolean},
						{Name: "WriteProtected", Kind: Boolean},
						{Name: "TransferMethod", Kind: String, Values: []string{"Stream", "Upload"}},
						{Name: "TransferProtocolType", Kind: String, Values: []string{"HTTP", "HTTPS"}},
					},
					Do: func(r *Request, v Values) (*Reply, error) {
						id, err := has(r)
						if err != nil {
							return nil, err
						}
						switch {
						case v.Has("Inserted") && !v.Bool("Inserted"):
							return nil, Because(400, "ActionParameterNotSupported", "An image is inserted at once, or not at all.", "Inserted", "VirtualMedia.InsertMedia")
						case v.Has("WriteProtected") && !v.Bool("WriteProtected"):
							return nil, Because(400, "ActionParameterNotSupported", "The drives are read-only.", "WriteProtected", "VirtualMedia.InsertMedia")
						case m.Image(id) != "":
							return nil, Because(409, "ResourceInUse", "There is an image in the drive: eject it first.")
						}
						return nil, m.Insert(r.Context(), id, v.String("Image"))
					},
				},
				{
					Name: "VirtualMedia.EjectMedia",
					Do: func(r *Request, _ Values) (*Reply, error) {
						id, err := has(r)
						if err != nil {
							return nil, err
						}
						return nil, m.Eject(r.Context(), id)
					},
				},
			},
		},
	}
}
