package s3double

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm = "AWS4-HMAC-SHA256"
	stamp     = "20060102T150405Z"
	unsigned  = "UNSIGNED-PAYLOAD"
	emptySum  = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// verify checks the signature of a request, and what headers say of its body. It
// returns the sha256 which the body must have, "" if that is not signed.
//
// https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-auth-using-authorization-header.html
func (s *Server) verify(r *http.Request, quirks Quirks) (sum string, err error) {
	header := r.Header
	for name := range header {
		if strings.HasPrefix(name, "X-Amz-Checksum-") || name == "X-Amz-Sdk-Checksum-Algorithm" || name == "X-Amz-Trailer" {
			return "", fail("NotImplemented", "%s is not implemented", name)
		}
	}
	if strings.Contains(header.Get("Content-Encoding"), "aws-chunked") || strings.HasPrefix(header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
		return "", fail("NotImplemented", "aws-chunked bodies are not implemented")
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return "", fail("InvalidURI", "the query cannot be read")
	}
	presigned := query.Has("X-Amz-Signature")
	if presigned && header.Get("Authorization") != "" {
		return "", fail("InvalidArgument", "signed in the query and in a header")
	}
	field := map[string]string{}
	var date string
	if presigned {
		if query.Get("X-Amz-Algorithm") != algorithm {
			return "", fail("AuthorizationQueryParametersError", "X-Amz-Algorithm is not %s", algorithm)
		}
		field["Credential"], field["SignedHeaders"], field["Signature"] = query.Get("X-Amz-Credential"), query.Get("X-Amz-SignedHeaders"), query.Get("X-Amz-Signature")
		date = query.Get("X-Amz-Date")
		sum = unsigned
	} else {
		fields, ok := strings.CutPrefix(header.Get("Authorization"), algorithm+" ")
		if !ok {
			return "", fail("AccessDenied", "not signed")
		}
		for part := range strings.SplitSeq(fields, ",") {
			name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
			field[name] = value
		}
		date = header.Get("X-Amz-Date")
		if sum = header.Get("X-Amz-Content-Sha256"); sum == "" {
			return "", fail("InvalidRequest", "x-amz-content-sha256 is missing")
		}
	}
	at, err := time.Parse(stamp, date)
	if err != nil {
		return "", fail("AccessDenied", "X-Amz-Date is missing or cannot be read")
	}
	scope := strings.Split(field["Credential"], "/")
	if len(scope) != 5 || scope[1] != date[:8] || scope[3] != "s3" || scope[4] != "aws4_request" {
		return "", fail("AuthorizationHeaderMalformed", "the credential is malformed")
	}
	if scope[2] != s.opts.Region {
		return "", fail("AuthorizationHeaderMalformed", "the region %s is wrong; expecting %s", scope[2], s.opts.Region)
	}
	if scope[0] != s.opts.Key {
		return "", fail("InvalidAccessKeyId", "there is no such access key")
	}
	token := header.Get("X-Amz-Security-Token")
	if presigned {
		token = query.Get("X-Amz-Security-Token")
	}
	if token != s.opts.Token {
		return "", fail("InvalidToken", "the security token is wrong")
	}
	now := s.now(quirks)
	if presigned {
		life, err := strconv.Atoi(query.Get("X-Amz-Expires"))
		if err != nil || life < 1 || life > 7*24*3600 {
			return "", fail("AuthorizationQueryParametersError", "X-Amz-Expires must be from 1 to 604800")
		}
		if now.After(at.Add(time.Duration(life)*time.Second)) || at.After(now.Add(15*time.Minute)) {
			return "", fail("AccessDenied", "Request has expired")
		}
	} else if skew := now.Sub(at).Abs(); skew > 15*time.Minute {
		return "", fail("RequestTimeTooSkewed", "the clocks are %s apart", skew)
	}

	names := strings.Split(field["SignedHeaders"], ";")
	if !slices.IsSorted(names) || !slices.Contains(names, "host") {
		return "", fail("SignatureDoesNotMatch", "the signed headers are not sorted, or host is missing")
	}
	for name := range header {
		if name = strings.ToLower(name); strings.HasPrefix(name, "x-amz-") && !slices.Contains(names, name) {
			return "", fail("AccessDenied", "there is a header that is not signed: %s", name)
		}
	}
	day := mac(mac(mac(mac([]byte("AWS4"+s.opts.Secret), scope[1]), scope[2]), scope[3]), scope[4])
	request := sha256.Sum256([]byte(canonical(r, query, names, sum, quirks)))
	want := hex.EncodeToString(mac(day, strings.Join([]string{algorithm, date, strings.Join(scope[1:], "/"), hex.EncodeToString(request[:])}, "\n")))
	if subtle.ConstantTimeCompare([]byte(want), []byte(field["Signature"])) != 1 {
		return "", fail("SignatureDoesNotMatch", "the signature is not that of this request and of the secret")
	}

	switch {
	case sum == unsigned && (presigned || r.TLS != nil):
		return "", nil
	case sum == unsigned:
		return "", fail("InvalidRequest", "UNSIGNED-PAYLOAD wants TLS")
	}
	if raw, err := hex.DecodeString(sum); err != nil || len(raw) != sha256.Size || strings.ToLower(sum) != sum {
		return "", fail("InvalidArgument", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD or a sha256")
	}
	return sum, nil
}

func mac(key []byte, data string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(data))
	return h.Sum(nil)
}

// canonical is what is signed of a request.
func canonical(r *http.Request, query url.Values, names []string, sum string, quirks Quirks) string {
	var b strings.Builder
	b.WriteString(r.Method + "\n" + escape(r.URL.Path, true) + "\n")
	var pairs []string
	for name, values := range query {
		for _, value := range values {
			if name != "X-Amz-Signature" {
				pairs = append(pairs, escape(name, false)+"="+escape(value, false))
			}
		}
	}
	slices.Sort(pairs)
	b.WriteString(strings.Join(pairs, "&") + "\n")
	for _, name := range names {
		values := r.Header.Values(name)
		switch {
		case name == "host":
			values = []string{r.Host}
		case name == "content-length":
			values = []string{strconv.FormatInt(r.ContentLength, 10)}
		case name == "accept-encoding" && quirks.AcceptEncoding != "":
			values = []string{quirks.AcceptEncoding}
		}
		for i, value := range values {
			values = slices.Clone(values)
			values[i] = strings.Join(strings.Fields(value), " ")
		}
		b.WriteString(name + ":" + strings.Join(values, ",") + "\n")
	}
	b.WriteString("\n" + strings.Join(names, ";") + "\n" + sum)
	return b.String()
}

// escape is the URI encoding of signatures.
func escape(text string, path bool) string {
	var b strings.Builder
	for _, c := range []byte(text) {
		switch {
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c == '.', c == '~', path && c == '/':
			b.WriteByte(c)
		default:
			b.WriteString("%" + strings.ToUpper(hex.EncodeToString([]byte{c})))
		}
	}
	return b.String()
}
