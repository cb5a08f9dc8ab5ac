package api

import (
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing"
)

// constants are those of a type Code in a file.
func constants(t *testing.T, file string) (codes []backing.Code) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		switch of := spec.Type.(type) {
		case *ast.Ident:
			ok = of.Name == "Code"
		case *ast.SelectorExpr:
			ok = of.Sel.Name == "Code"
		default:
			ok = false
		}
		if value, literal := spec.Values[0].(*ast.BasicLit); ok && literal {
			text, err := strconv.Unquote(value.Value)
			if err != nil {
				t.Fatal(err)
			}
			codes = append(codes, backing.Code(text))
		}
		return true
	})
	return codes
}

func TestEveryCodeHasARow(t *testing.T) {
	all := append(constants(t, "../errors.go"), constants(t, "codes.go")...)
	if len(all) < 20 {
		t.Fatalf("%d codes were found: %q", len(all), all)
	}
	for _, code := range all {
		row, ok := codes[code]
		if !ok || row.title == "" || http.StatusText(row.status) == "" {
			t.Errorf("%s: %+v", code, row)
		}
		if busy := row.status == http.StatusTooManyRequests || row.status == http.StatusServiceUnavailable; busy != (row.after > 0) {
			t.Errorf("%s: %d, and Retry-After is %v", code, row.status, row.after)
		}
	}
	page, err := os.ReadFile("../../../docs/backing-images-api.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := strings.Split(string(page), "\n")
	for code, row := range codes {
		if !slices.ContainsFunc(rows, func(line string) bool {
			return strings.HasPrefix(line, "| "+strconv.Itoa(row.status)+" |") && strings.Contains(line, "`"+string(code)+"`")
		}) {
			t.Errorf("docs/backing-images-api.md does not say that %s is %d", code, row.status)
		}
	}
	if len(all) != len(codes) {
		t.Errorf("%d codes, and %d rows", len(all), len(codes))
	}
}
