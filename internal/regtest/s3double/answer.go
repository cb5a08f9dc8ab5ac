package s3double

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
)

// A failure is an error as S3 answers it.
type failure struct {
	status        int
	code, message string
}

func (f *failure) Error() string { return f.code + ": " + f.message }

// statuses are those of the codes; 400 if it is not here.
//
// https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
var statuses = map[string]int{
	"AccessDenied": 403, "InvalidAccessKeyId": 403, "SignatureDoesNotMatch": 403, "RequestTimeTooSkewed": 403,
	"SecondLevelDomainForbidden": 403,
	"NoSuchKey":                  404, "NoSuchBucket": 404, "NoSuchUpload": 404,
	"MissingContentLength": 411, "PreconditionFailed": 412, "InvalidRange": 416,
	"NotModified": 304, "InternalError": 500, "NotImplemented": 501, "SlowDown": 503, "ServiceUnavailable": 503,
}

func fail(code, message string, args ...any) *failure {
	status := statuses[code]
	if status == 0 {
		status = http.StatusBadRequest
	}
	return &failure{status, code, fmt.Sprintf(message, args...)}
}

// refusal is the answer that tells of an error.
func refusal(err error, r *http.Request) answer {
	var f *failure
	if !errors.As(err, &f) {
		f = fail("InternalError", "%v", err)
	}
	if f.status == http.StatusNotModified || r.Method == http.MethodHead {
		return answer{status: f.status, header: http.Header{}}
	}
	return document(f.status, struct {
		XMLName       xml.Name `xml:"Error"`
		Code, Message string
		Resource      string
		RequestId     string
	}{Code: f.code, Message: f.message, Resource: r.URL.Path, RequestId: "double"})
}

// document is an answer with a document.
func document(status int, content any) answer {
	data, err := xml.Marshal(content)
	if err != nil {
		panic(err)
	}
	data = append([]byte(xml.Header), data...)
	return answer{status, http.Header{"Content-Type": {"application/xml"}}, bytes.NewReader(data), int64(len(data))}
}

type location struct {
	XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ LocationConstraint"`
	Region  string   `xml:",chardata"`
}
