package service

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// query is the query options of a GET (DSP0266, "Query parameters").
type query struct {
	expand   byte // 0, '.', '*' or '~'
	levels   int
	selected [][]string // paths of properties
	only     bool
	excerpt  bool
	filter   *filter
	text     string // of the filter, escaped, for links to further pages
	top      int    // -1 if not given
	skip     int
	skipSent bool
}

const maxExpandLevels = 4

func (q query) empty() bool {
	return q.expand == 0 && q.selected == nil && !q.only && !q.excerpt && q.filter == nil && q.top < 0 && !q.skipSent
}

// parseQuery reads the options of a request. Options that begin with $ and are not supported are refused with 501; other
// parameters that are not known are ignored.
func parseQuery(raw string) (query, *Error) {
	q := query{top: -1}
	if raw == "" {
		return q, nil
	}
	seen := map[string]bool{}
	for part := range strings.SplitSeq(raw, "&") {
		if part == "" {
			continue
		}
		k, v, hasValue := strings.Cut(part, "=")
		key, err1 := url.QueryUnescape(k)
		value, err2 := url.QueryUnescape(v)
		if err1 != nil || err2 != nil {
			return q, refuse(400, "QueryParameterValueFormatError", v, k)
		}
		if seen[key] && (strings.HasPrefix(key, "$") || key == "only" || key == "excerpt") {
			return q, refuse(400, "QueryCombinationInvalid")
		}
		seen[key] = true
		var e *Error
		switch key {
		case "$expand":
			q.expand, q.levels, e = parseExpand(value)
		case "$select":
			q.selected, e = parseSelect(value)
		case "$top":
			q.top, e = parseCount(key, value)
		case "$skip":
			q.skip, e = parseCount(key, value)
			q.skipSent = true
		case "$filter":
			f, err := parseFilter(value)
			if err != nil {
				e = Because(400, "QueryParameterValueFormatError", "The value of $filter cannot be read: "+err.Error()+".", value, key)
			}
			q.filter, q.text = f, v
		case "only", "excerpt":
			if key == "only" {
				q.only = true
			} else {
				q.excerpt = true
			}
			if hasValue {
				e = refuse(400, "QueryParameterValueFormatError", value, key)
			}
		case "includeoriginofcondition":
			e = refuse(501, "QueryParameterUnsupported", key)
		default:
			if strings.HasPrefix(key, "$") {
				e = refuse(501, "QueryParameterUnsupported", key)
			}
		}
		if e != nil {
			return q, e
		}
	}
	if q.only && (q.expand != 0 || q.filter != nil || q.top >= 0 || q.skipSent) || q.excerpt && q.selected != nil {
		return q, refuse(400, "QueryCombinationInvalid")
	}
	return q, nil
}

// parseExpand reads the value of $expand: ".", "*" or "~", and perhaps "($levels=2)".
func parseExpand(value string) (how byte, levels int, _ *Error) {
	bad := func() (byte, int, *Error) {
		return 0, 0, refuse(400, "QueryParameterValueFormatError", value, "$expand")
	}
	if value == "" || !strings.Contains(".*~", value[:1]) {
		return bad()
	}
	how, rest := value[0], value[1:]
	if rest == "" {
		return how, 1, nil
	}
	rest, ok1 := strings.CutPrefix(rest, "($levels=")
	rest, ok2 := strings.CutSuffix(rest, ")")
	n, err := strconv.Atoi(rest)
	switch {
	case !ok1 || !ok2:
		return bad()
	case err != nil:
		return 0, 0, refuse(400, "QueryParameterValueTypeError", rest, "$levels")
	case n < 1 || n > maxExpandLevels:
		return 0, 0, refuse(400, "QueryParameterOutOfRange", rest, "$levels", fmt.Sprintf("1 to %d", maxExpandLevels))
	}
	return how, n, nil
}

// parseSelect reads the value of $select: property names, or paths to them, with commas between.
func parseSelect(value string) ([][]string, *Error) {
	var out [][]string
	for item := range strings.SplitSeq(value, ",") {
		path, ok := propertyPath(strings.TrimSpace(item))
		if !ok || len(out) >= 100 {
			return nil, refuse(400, "QueryParameterValueFormatError", value, "$select")
		}
		out = append(out, path)
	}
	return out, nil
}

func parseCount(key, value string) (int, *Error) {
	n, err := strconv.ParseInt(value, 10, 32)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && n < 0:
		return 0, refuse(400, "QueryParameterOutOfRange", value, key, "0 to 2147483647")
	case err != nil:
		return 0, refuse(400, "QueryParameterValueTypeError", value, key)
	}
	return int(n), nil
}

// query applies the options to a representation.
func (s *Service) query(r *Request, q query, body []byte) ([]byte, string, error) {
	collection := r.node.route.collection()
	if !collection && (q.only || q.filter != nil || q.top >= 0 || q.skipSent) {
		return nil, "", refuse(400, "QueryNotSupportedOnResource")
	}
	var v map[string]any
	if err := decodeExact(body, &v); err != nil {
		return nil, "", fmt.Errorf("decode %s: %w", r.URI, err)
	}
	if q.only {
		if members, _ := v["Members"].([]any); len(members) == 1 {
			member, err := s.only(r, members[0])
			if err != nil {
				return nil, "", err
			}
			v, collection = member, false
		}
	}
	if q.excerpt {
		s.excerpt(r.node, v)
	}
	if q.expand != 0 {
		budget := s.limits.Expanded
		if err := s.expand(r, q.expand, q.levels, v, "", &budget); err != nil {
			return nil, "", err
		}
	}
	if q.excerpt && collection {
		members, _ := v["Members"].([]any)
		for _, m := range members {
			if m, ok := m.(map[string]any); ok && !reference(m) {
				uri, _ := m["@odata.id"].(string)
				if n, _ := s.tree.find(uri); n != nil && n.route != nil {
					s.excerpt(n, m)
				}
			}
		}
	}
	if q.selected != nil {
		choose(v, q.selected, collection)
	}
	whole, _ := v["@odata.etag"].(string)
	delete(v, "@odata.etag")
	body, err := json.Marshal(v)
	if err != nil {
		return nil, "", fmt.Errorf("encode %s: %w", r.URI, err)
	}
	etag := s.etag(body, nil)
	if i := strings.LastIndexByte(whole, ':'); i >= 0 { // the settings are the same, whatever is shown of them
		etag = strings.TrimSuffix(etag, `"`) + whole[i:]
	}
	out := append([]byte(`{"@odata.etag":`), strconv.AppendQuote(nil, etag)...)
	if len(v) > 0 {
		out = append(out, ',')
	}
	return append(out, body[1:]...), etag, nil
}

// excerpt leaves the properties that the schema marks as its excerpt, if it marks any, and OData's own.
func (s *Service) excerpt(n *node, v map[string]any) {
	if n.route.Excerpt == nil {
		return
	}
	for name := range v {
		if !slices.Contains(n.route.Excerpt, name) && !strings.HasPrefix(name, "@odata.") {
			delete(v, name)
		}
	}
}

// matches returns the indices of the members of a collection that satisfy a filter.
func (s *Service) matches(r *Request, f *filter, total int, member func(int) (json.RawMessage, error)) ([]int, error) {
	var hits []int
	for i := range total {
		if err := r.ctx.Err(); err != nil {
			return nil, err
		}
		b, err := member(i)
		if errors.Is(err, ErrNotFound) {
			continue // gone since the list was made
		}
		if err != nil {
			return nil, err
		}
		var v map[string]any
		if err := decodeExact(b, &v); err != nil {
			return nil, fmt.Errorf("decode member of %s: %w", r.URI, err)
		}
		if reference(v) {
			var e *Error
			_, v, err = s.fetch(r, v)
			if errors.Is(err, ErrNotFound) || errors.As(err, &e) && (e.Status == 403 || e.Status == 404) {
				continue // what the caller may not read must not be told by a filter either
			}
			if err != nil {
				return nil, err
			}
		}
		if f.match(v) {
			hits = append(hits, i)
		}
	}
	return hits, nil
}

// decodeExact decodes JSON with its numbers as they were written.
func decodeExact(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	return dec.Decode(v)
}

// only returns the single member of a collection.
func (s *Service) only(r *Request, member any) (map[string]any, error) {
	m, ok := member.(map[string]any)
	if !ok {
		return nil, errors.New("member is not an object")
	}
	if !reference(m) {
		return m, nil
	}
	sub, v, err := s.fetch(r, m)
	if err != nil {
		return nil, err
	}
	r.node = sub.node // whose schema now describes the answer
	return v, nil
}

// reference reports whether an object is nothing but a link to a resource.
func reference(m map[string]any) bool {
	id, ok := m["@odata.id"].(string)
	return ok && len(m) == 1 && !strings.Contains(id, "#")
}

// fetch reads the resource that a link points to, if the caller may.
func (s *Service) fetch(r *Request, link map[string]any) (*Request, map[string]any, error) {
	uri, _ := link["@odata.id"].(string)
	sub, err := r.sub(uri)
	if err != nil {
		return nil, nil, err
	}
	if p := sub.node.privileges["GET"]; !p.open() && !p.allows(r.Caller.privileges, s.own(sub)) {
		return nil, nil, refuse(403, "InsufficientPrivilege")
	}
	body, _, err := s.render(sub, query{top: -1})
	if err != nil {
		return nil, nil, sub.missing(err)
	}
	var v map[string]any
	if err := decodeExact(body, &v); err != nil {
		return nil, nil, fmt.Errorf("decode %s: %w", uri, err)
	}
	return sub, v, nil
}

// expand puts resources in the place of links to them: of all links ('*'), of those outside of Links ('.'), or of those in
// Links ('~'). A resource that the caller may not see, or that has gone, stays a link.
func (s *Service) expand(r *Request, how byte, levels int, v any, key string, budget *int) error {
	switch v := v.(type) {
	case []any:
		for i, item := range v {
			m, ok := item.(map[string]any)
			if !ok || !reference(m) {
				if err := s.expand(r, how, levels, item, key, budget); err != nil {
					return err
				}
				continue
			}
			out, err := s.expandLink(r, how, levels, m, key, budget)
			if err != nil {
				return err
			}
			v[i] = out
		}
	case map[string]any:
		for name, item := range v {
			below := key
			if name == "Links" {
				below = name
			}
			m, ok := item.(map[string]any)
			if !ok || !reference(m) {
				if err := s.expand(r, how, levels, item, below, budget); err != nil {
					return err
				}
				continue
			}
			out, err := s.expandLink(r, how, levels, m, below, budget)
			if err != nil {
				return err
			}
			v[name] = out
		}
	}
	return nil
}

func (s *Service) expandLink(r *Request, how byte, levels int, link map[string]any, key string, budget *int) (map[string]any, error) {
	if how == '.' && key == "Links" || how == '~' && key != "Links" {
		return link, nil
	}
	if *budget--; *budget < 0 {
		return nil, Because(400, "QueryParameterOutOfRange",
			fmt.Sprintf("Expanding the resource would take more than the %d resources that fit into one answer.", s.limits.Expanded), "$expand", "$expand", "less")
	}
	if err := r.ctx.Err(); err != nil {
		return nil, err
	}
	sub, v, err := s.fetch(r, link)
	var e *Error
	switch {
	case errors.Is(err, ErrNotFound) || errors.As(err, &e) && (e.Status == 403 || e.Status == 404):
		return link, nil
	case err != nil:
		return nil, err
	}
	if levels > 1 {
		if err := s.expand(sub, how, levels-1, v, "", budget); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// choose leaves the selected properties, and OData's own. In a collection it works on expanded members, unless it names
// properties of the collection itself.
func choose(v map[string]any, paths [][]string, collection bool) {
	if collection {
		direct := false
		for _, p := range paths {
			if _, ok := v[p[0]]; ok {
				direct = true
			}
		}
		members, _ := v["Members"].([]any)
		if !direct {
			for _, m := range members {
				if m, ok := m.(map[string]any); ok {
					choose(m, paths, false)
				}
			}
			return
		}
	}
	below := map[string][][]string{}
	whole := map[string]bool{}
	for _, p := range paths {
		if len(p) == 1 {
			whole[p[0]] = true
		} else {
			below[p[0]] = append(below[p[0]], p[1:])
		}
	}
	for name, value := range v {
		switch {
		case whole[name] || strings.HasPrefix(name, "@odata.") || collection && strings.HasPrefix(name, "Members@"):
		case below[name] != nil:
			chooseBelow(value, below[name])
		default:
			delete(v, name)
		}
	}
}

func chooseBelow(v any, paths [][]string) {
	switch v := v.(type) {
	case map[string]any:
		choose(v, paths, false)
	case []any:
		for _, item := range v {
			chooseBelow(item, paths)
		}
	}
}

// memberType returns the type of a collection's members, where the route of the members follows from the collection's.
func memberType(collection string) string {
	if collection == schema.TypeLogEntryCollection {
		return schema.TypeLogEntry
	}
	panic("members of " + collection + " have no known type")
}
