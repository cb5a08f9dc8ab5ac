package s3

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/caddy-registry/mirror/storage"
)

// A fault is a call that did not do what it was for.
type fault struct {
	text    string // names no URL and no secret
	is      error  // storage.ErrUnavailable, fs.ErrNotExist, why the caller has gone, or nil
	code    string // what S3 calls it, or ""
	status  int    // of HTTP; 0: no answer
	header  http.Header
	again   bool          // trying again may help
	after   time.Duration // what Retry-After asks for
	unsure  bool          // what was asked for may have been done
	expired bool          // the credentials have
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.is }

// unavailable reports whether it is the server that is, and not only what it was
// asked for.
func (f *fault) unavailable() bool {
	return f.is == storage.ErrUnavailable && f.status != http.StatusConflict
}

// raced reports whether a refusal may pass at once. MinIO says AccessDenied of what is
// stored while the last object beside it is being deleted, and the directory of both
// with it. Nothing was stored then, and the same bytes under the same key may be sent
// again; whoever is refused for good hears so at the second try.
func (f *fault) raced(o operation) bool {
	switch o {
	case opPut, opCreate, opPart, opComplete:
		return f.code == "AccessDenied"
	}
	return false
}

func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// outage reports whether an error is that S3 does not answer now, and not that it
// refuses.
func outage(err error) bool {
	if f, ok := errors.AsType[*fault](err); ok && f.status != 0 {
		return f.again
	}
	return errors.Is(err, storage.ErrUnavailable)
}

// coded reports whether S3 gave one of these codes.
func coded(err error, codes ...string) bool {
	f, ok := errors.AsType[*fault](err)
	if ok {
		for _, code := range codes {
			if f.code == code {
				return true
			}
		}
	}
	return false
}

func (b *bucket) about(o operation, key string) string {
	if key == "" {
		key = "the bucket " + b.name
	}
	return "s3: " + kinds[o].doing + " " + key
}

// refused is the error of a call that is not made because the last ones failed.
func (b *bucket) refused(o operation, key string) *fault {
	return &fault{text: fmt.Sprintf("%s: %s has not answered the last calls, and is left alone for a moment", b.about(o, key), b.host()), is: storage.ErrUnavailable}
}

// ended is the error of a call whose caller does not wait any more.
func (b *bucket) ended(ctx context.Context, o operation, key string, last *fault) *fault {
	text := fmt.Sprintf("%s: %v", b.about(o, key), ctx.Err())
	if last != nil {
		text += "; before that: " + last.text
	}
	return &fault{text: text, is: ctx.Err()}
}

// broken is the error of a body that did not come whole.
func (b *bucket) broken(ctx context.Context, key string, err error) *fault {
	if ctx.Err() != nil {
		return b.ended(ctx, opGet, key, nil)
	}
	return &fault{text: fmt.Sprintf("%s: %s broke off: %s", b.about(opGet, key), b.host(), cause(err)), is: storage.ErrUnavailable}
}

// host is the server as messages call it.
func (b *bucket) host() string {
	if b.where == "" {
		return "S3"
	}
	return b.where
}

var query = regexp.MustCompile(`\?[^\s"']*`)

// cause is the innermost of what the network says, without URLs.
func cause(err error) string {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	return bounded(query.ReplaceAllString(err.Error(), ""))
}

func bounded(s string) string {
	const most = 300
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.Join(strings.Fields(s), " ")
}

// fault finds out what an error of the SDK means.
func (b *bucket) fault(r *remote, o operation, key string, err error) *fault {
	f := &fault{}
	say := func(format string, args ...any) *fault {
		f.text = b.about(o, key) + ": " + fmt.Sprintf(format, args...)
		return f
	}
	var response *smithyhttp.ResponseError
	if errors.As(err, &response) && response.Response != nil && response.Response.Response != nil {
		f.status = response.Response.StatusCode
		f.header = response.Response.Header
	}
	if none, ok := errors.AsType[noCredentials](err); ok {
		f.is, f.status = storage.ErrUnavailable, 0
		return say("no credentials: %s; give them in the credentials option, or where AWS's tools look for them", r.secrets.Replace(cause(none.error)))
	}
	message := ""
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		f.code, message = api.ErrorCode(), bounded(query.ReplaceAllString(r.secrets.Replace(api.ErrorMessage()), ""))
	}
	told := f.code
	if told == "" || told == "UnknownError" {
		told = http.StatusText(f.status)
	}
	if f.status != 0 {
		told += fmt.Sprintf(" (%d)", f.status)
	}
	if message != "" && message != f.code && message != "UnknownError" {
		told += ": " + message
	}

	switch f.code {
	case "NoSuchBucket", "InvalidBucketName":
		f.is = storage.ErrUnavailable
		return say("%s has no bucket %s: make it, or correct its name, the endpoint or the region", b.host(), b.name)
	case "NoSuchUpload", "InvalidPart", "InvalidPartOrder":
		return say("%s", told)
	case "XAdminUserNotFound", "InvalidToken":
		// versitygw says so of a key that it does not know, with 404: it is not the
		// object that is absent.
		f.is = storage.ErrUnavailable
		return say("%s; check the credentials", told)
	case "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidLocationConstraint":
		f.is = storage.ErrUnavailable
		return say("%s; correct the endpoint or the region", told)
	case "EntityTooLarge":
		return say("%s; lower put_limit", told)
	case "InvalidArgument":
		if o == opPart {
			return say("%s; lower max_parts if it is the number of the part", told)
		}
		return say("%s says %s", b.host(), told)
	case "EntityTooSmall":
		return say("%s; raise part_size", told)
	case "XAmzContentSHA256Mismatch", "BadDigest":
		return say("%s; the local file is damaged, or a proxy changes what passes", told)
	case "RequestTimeTooSkewed":
		f.is, f.again = storage.ErrUnavailable, true
		return say("%s; set the clock of this machine", told)
	case "ExpiredToken", "TokenRefreshRequired":
		f.is, f.again, f.expired = storage.ErrUnavailable, true, true
		return say("%s", told)
	case "RequestTimeout", "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError", "ServiceUnavailable":
		f.is, f.again, f.after = storage.ErrUnavailable, true, retryAfter(f.header)
		f.unsure = f.code == "InternalError" || f.code == "RequestTimeout"
		return say("%s says %s", b.host(), told)
	}

	switch {
	case f.status == http.StatusNotFound && (o == opGet || o == opHead || o == opDelete):
		// An answer to HEAD has no body that would say more; see find.
		if o == opHead || f.code == "NoSuchKey" || f.code == "NotFound" && message != http.StatusText(f.status) {
			f.is = fs.ErrNotExist
			return say("%v", fs.ErrNotExist)
		}
		// A proxy whose server is gone says so, or one that is no S3 at all.
		f.is, f.again = storage.ErrUnavailable, true
		return say("%s says %s, and not as S3 says it of an object that is not there; check the endpoint, and what stands before it", b.host(), told)
	case f.status == http.StatusUnauthorized || f.status == http.StatusForbidden:
		f.is = storage.ErrUnavailable
		return say("%s; check the credentials and what they allow: to get, put, delete and list", told)
	case f.status == http.StatusConflict:
		// Something else is being done in the same place. versitygw says so of a
		// directory that another call is removing, as ExistingObjectIsDirectory.
		f.is, f.again = storage.ErrUnavailable, true
		return say("%s", told)
	case f.status == http.StatusNotImplemented || f.status == http.StatusMethodNotAllowed:
		if o == opList && !r.settings.ListV1 {
			told += "; if it does not know version 2 of listing, write list v1"
		}
		return say("%s does not know how to: %s", b.host(), told)
	case f.status >= 500 || f.status == http.StatusTooManyRequests || f.status == http.StatusRequestTimeout:
		f.is, f.again, f.after = storage.ErrUnavailable, true, retryAfter(f.header)
		f.unsure = f.status != http.StatusServiceUnavailable && f.status != http.StatusTooManyRequests
		return say("%s says %s", b.host(), told)
	case 300 <= f.status && f.status < 400:
		f.is = storage.ErrUnavailable
		return say("%s sends elsewhere (%d); correct the endpoint or the region", b.host(), f.status)
	case f.status >= 400:
		return say("%s says %s", b.host(), told)
	case f.status != 0:
		// An answer that cannot be read.
		f.is, f.again, f.unsure = storage.ErrUnavailable, true, true
		return say("%s answered what cannot be understood: %s", b.host(), r.secrets.Replace(cause(err)))
	}
	if sending, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		f.is, f.again, f.unsure = storage.ErrUnavailable, true, true
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			f.unsure = false
		}
		return say("%s does not answer: %s", b.host(), r.secrets.Replace(cause(sending.Err)))
	}
	return say("%s", r.secrets.Replace(cause(err)))
}

// retryAfter is in seconds, or a date (RFC 9110 section 10.2.3).
func retryAfter(h http.Header) time.Duration {
	value := h.Get("Retry-After")
	if seconds, err := strconv.Atoi(value); err == nil {
		return time.Duration(min(max(seconds, 0), 3600)) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}
