package service

import (
	"cmp"
	"encoding/json"
	"math/big"
	"strconv"
	"strings"
	"time"
)

// filter is an expression of $filter (DSP0266, "$filter"): the comparisons eq, ne, gt, ge, lt and le between a property and a
// literal, with and, or, not and parentheses around them.
type filter struct {
	op   string // a comparison, "and", "or" or "not"
	a, b *filter

	// of a comparison
	path    []string // of the property
	literal any      // string, json.Number, bool or nil
	swapped bool     // the literal was written first
}

const (
	maxFilter      = 2048 // bytes of an expression
	maxFilterDepth = 20   // of parentheses and nots
)

// filterError says where an expression is wrong.
type filterError struct {
	at   int // byte offset
	what string
}

func (e *filterError) Error() string {
	return "the expression is wrong at character " + strconv.Itoa(e.at+1) + ": " + e.what
}

// parseFilter reads an expression. Precedence is not, and, or, as OData has it.
func parseFilter(text string) (*filter, error) {
	if len(text) > maxFilter {
		return nil, &filterError{maxFilter, "it is too long"}
	}
	p := &filterParser{text: text}
	p.next()
	f, err := p.or(0)
	if err != nil {
		return nil, err
	}
	if p.token != "" || p.bad != "" {
		return nil, p.wrong("an operator or the end")
	}
	return f, nil
}

// filterParser is a parser by recursive descent that looks one token ahead.
type filterParser struct {
	text  string
	pos   int    // behind token
	start int    // of token
	token string // "" at the end
	bad   string // what is wrong with the token, if anything
}

// next reads a token: a parenthesis, a string in single quotes, or a word.
func (p *filterParser) next() {
	for p.pos < len(p.text) && (p.text[p.pos] == ' ' || p.text[p.pos] == '\t') {
		p.pos++
	}
	p.start, p.token, p.bad = p.pos, "", ""
	if p.pos == len(p.text) {
		return
	}
	switch p.text[p.pos] {
	case '(', ')':
		p.pos++
	case '\'':
		for p.pos++; ; {
			end := strings.IndexByte(p.text[p.pos:], '\'')
			if end < 0 {
				p.pos, p.bad = len(p.text), "a string has no end"
				return
			}
			p.pos += end + 1
			if p.pos == len(p.text) || p.text[p.pos] != '\'' { // two quotes stand for one
				break
			}
			p.pos++
		}
	default:
		for p.pos < len(p.text) && !strings.ContainsRune(" \t()'", rune(p.text[p.pos])) {
			p.pos++
		}
	}
	p.token = p.text[p.start:p.pos]
}

func (p *filterParser) wrong(want string) error {
	if p.bad != "" {
		return &filterError{p.start, p.bad}
	}
	if p.token == "" {
		return &filterError{p.start, "it ends where " + want + " is wanted"}
	}
	return &filterError{p.start, strconv.Quote(clip(p.token)) + " stands where " + want + " is wanted"}
}

func (p *filterParser) or(depth int) (*filter, error) {
	a, err := p.and(depth)
	for err == nil && p.token == "or" {
		p.next()
		var b *filter
		if b, err = p.and(depth); err == nil {
			a = &filter{op: "or", a: a, b: b}
		}
	}
	return a, err
}

func (p *filterParser) and(depth int) (*filter, error) {
	a, err := p.term(depth)
	for err == nil && p.token == "and" {
		p.next()
		var b *filter
		if b, err = p.term(depth); err == nil {
			a = &filter{op: "and", a: a, b: b}
		}
	}
	return a, err
}

func (p *filterParser) term(depth int) (*filter, error) {
	if depth > maxFilterDepth {
		return nil, &filterError{p.start, "it is nested too deep"}
	}
	switch p.token {
	case "not":
		p.next()
		a, err := p.term(depth + 1)
		if err != nil {
			return nil, err
		}
		return &filter{op: "not", a: a}, nil
	case "(":
		p.next()
		a, err := p.or(depth + 1)
		if err != nil {
			return nil, err
		}
		if p.token != ")" {
			return nil, p.wrong("a closing parenthesis")
		}
		p.next()
		return a, nil
	}
	return p.comparison()
}

func (p *filterParser) comparison() (*filter, error) {
	at := p.start
	left, value, err := p.operand()
	if err != nil {
		return nil, err
	}
	f := &filter{path: left, literal: value, swapped: left == nil}
	switch p.token {
	case "eq", "ne", "gt", "ge", "lt", "le":
		f.op = p.token
	default:
		return nil, p.wrong("a comparison (eq, ne, gt, ge, lt, le)")
	}
	p.next()
	right, value, err := p.operand()
	if err != nil {
		return nil, err
	}
	if (left == nil) == (right == nil) {
		return nil, &filterError{at, "a comparison is between a property and a literal"}
	}
	if f.swapped {
		f.path = right
	} else {
		f.literal = value
	}
	return f, nil
}

// operand takes the path of a property, or a literal, whose path is nil.
func (p *filterParser) operand() (path []string, value any, err error) {
	const want = "a property or a literal"
	if p.token == "" || p.bad != "" || isOperator(p.token) {
		return nil, nil, p.wrong(want)
	}
	value, ok := literal(p.token)
	if !ok {
		if path, ok = propertyPath(p.token); !ok {
			return nil, nil, p.wrong(want)
		}
	}
	p.next()
	return path, value, nil
}

func isOperator(s string) bool {
	switch s {
	case "eq", "ne", "gt", "ge", "lt", "le", "and", "or", "not":
		return true
	}
	return false
}

// literal returns the value of a string in quotes, a number, true, false or null.
func literal(token string) (any, bool) {
	switch {
	case token == "true":
		return true, true
	case token == "false":
		return false, true
	case token == "null":
		return nil, true
	case strings.HasPrefix(token, "'"):
		return strings.ReplaceAll(token[1:max(1, len(token)-1)], "''", "'"), true
	case token != "" && (token[0] == '-' || '0' <= token[0] && token[0] <= '9') && json.Valid([]byte(token)):
		return json.Number(token), true
	}
	return nil, false
}

// propertyPath splits the path of a property, such as Status/Health.
func propertyPath(s string) (path []string, ok bool) {
	path = strings.Split(s, "/")
	for _, name := range path {
		if name == "" || name[0] == '-' || '0' <= name[0] && name[0] <= '9' || strings.ContainsFunc(name, func(r rune) bool {
			return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("@._#-", r))
		}) {
			return nil, false
		}
	}
	return path, len(path) <= 10
}

// match reports whether a resource satisfies the expression. A property that is absent is null. One in an array satisfies a
// comparison if any of its values does.
func (f *filter) match(v map[string]any) bool {
	switch f.op {
	case "and":
		return f.a.match(v) && f.b.match(v)
	case "or":
		return f.a.match(v) || f.b.match(v)
	case "not":
		return !f.a.match(v)
	}
	return f.compare(v, f.path)
}

// compare follows the path and compares what is there.
func (f *filter) compare(v any, path []string) bool {
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			if f.compare(item, path) {
				return true
			}
		}
		return false
	case map[string]any:
		if len(path) > 0 {
			return f.compare(v[path[0]], path[1:])
		}
		return f.op == "ne" // an object is equal to no literal
	}
	if len(path) > 0 {
		v = nil
	}
	c, comparable := compareValues(v, f.literal)
	if f.swapped {
		c = -c
	}
	switch f.op {
	case "eq":
		return comparable && c == 0
	case "ne":
		return !comparable || c != 0
	case "gt":
		return comparable && c > 0 && v != nil
	case "ge":
		return comparable && c >= 0 && v != nil
	case "lt":
		return comparable && c < 0 && v != nil
	default:
		return comparable && c <= 0 && v != nil
	}
}

// compareValues orders two values, if they are of one kind. Strings that are times are compared as times.
func compareValues(v, literal any) (int, bool) {
	switch l := literal.(type) {
	case nil:
		return 0, v == nil
	case bool:
		b, ok := v.(bool)
		switch {
		case b == l:
			return 0, ok
		case l:
			return -1, ok
		}
		return 1, ok
	case json.Number:
		a, ok1 := number(v)
		b, ok2 := number(l)
		if !ok1 || !ok2 {
			return 0, false
		}
		return a.Cmp(b), true
	case string:
		s, ok := v.(string)
		if !ok {
			return 0, false
		}
		if t, err := time.Parse(time.RFC3339, l); err == nil {
			if u, err := time.Parse(time.RFC3339, s); err == nil {
				return u.Compare(t), true
			}
		}
		return cmp.Compare(s, l), true
	}
	return 0, false
}

// number returns a JSON number as a float of 128 bits: counters of 64 bits stay exact, and no exponent costs memory.
func number(v any) (*big.Float, bool) {
	var text string
	switch v := v.(type) {
	case float64:
		return new(big.Float).SetPrec(128).SetFloat64(v), true
	case json.Number:
		text = v.String()
	default:
		return nil, false
	}
	if len(text) > 40 {
		return nil, false
	}
	f, _, err := big.ParseFloat(text, 10, 128, big.ToNearestEven)
	return f, err == nil
}
