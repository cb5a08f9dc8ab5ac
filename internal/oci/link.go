package oci

import (
	"net/http"
	"net/url"
	"strings"
)

// NextLink finds the target of rel="next" among the Link headers of a listing
// (spec, "Listing tags"), resolved against the address that was asked. It is
// nil on the last page, and for a link that cannot be read.
func NextLink(header http.Header, asked *url.URL) *url.URL {
	for _, line := range header.Values("Link") {
		for line != "" {
			open := strings.IndexByte(line, '<')
			if open < 0 {
				break
			}
			end := strings.IndexByte(line[open:], '>')
			if end < 0 {
				break
			}
			target := line[open+1 : open+end]
			line = line[open+end+1:]
			params := line
			if i := strings.IndexByte(line, '<'); i >= 0 {
				params = line[:i]
			}
			if !isNext(params) {
				continue
			}
			next, err := asked.Parse(target)
			if err != nil {
				return nil
			}
			return next
		}
	}
	return nil
}

func isNext(params string) bool {
	for param := range strings.SplitSeq(params, ";") {
		key, value, _ := strings.Cut(strings.Trim(param, " \t,"), "=")
		if !strings.EqualFold(strings.TrimSpace(key), "rel") {
			continue
		}
		for relation := range strings.FieldsSeq(strings.Trim(value, `" `)) {
			if strings.EqualFold(relation, "next") {
				return true
			}
		}
	}
	return false
}

// SetNextLink tells the client where the following page is.
func SetNextLink(header http.Header, path string, query url.Values) {
	header.Set("Link", "<"+(&url.URL{Path: path, RawQuery: query.Encode()}).String()+`>; rel="next"`)
}
