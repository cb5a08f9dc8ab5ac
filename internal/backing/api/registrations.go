package api

import (
	"net/http"

	"github.com/caddy-registry/mirror/internal/backing"
)

func (x *exchange) registrations() error {
	v, err := x.library.Version(x.r.Context(), x.vars["name"], x.vars["version"])
	if err != nil {
		return err
	}
	if v.Registrations == nil {
		v.Registrations = []backing.Registration{}
	}
	return x.json(http.StatusOK, map[string]any{"items": v.Registrations})
}

func (x *exchange) registration() error {
	v, err := x.library.Version(x.r.Context(), x.vars["name"], x.vars["version"])
	if err != nil {
		return err
	}
	for _, r := range v.Registrations {
		if r.Cluster == x.vars["cluster"] {
			return x.json(http.StatusOK, r)
		}
	}
	return fail(notFound, "%s %s is not registered with a cluster %.63q", v.Name, v.Version, x.vars["cluster"])
}

func (x *exchange) register() error {
	var o backing.RegistrationOptions
	if err := x.decode(&o, true); err != nil {
		return err
	}
	r, err := x.library.Register(x.r.Context(), x.vars["name"], x.vars["version"], o)
	if err != nil {
		return err
	}
	x.w.Header().Set("Location", x.relative(images+"/"+x.vars["name"]+"/versions/"+x.vars["version"]+"/registrations/"+r.Cluster))
	return x.json(http.StatusAccepted, r)
}

func (x *exchange) unregister() error {
	q, err := x.query("forget")
	if err != nil {
		return err
	}
	forget, err := flag(q, "forget")
	if err != nil {
		return err
	}
	remove := x.library.Unregister
	if forget {
		remove = x.library.Forget
	}
	if err := remove(x.r.Context(), x.vars["name"], x.vars["version"], x.vars["cluster"]); err != nil {
		return err
	}
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (x *exchange) manifest() error {
	q, err := x.query("cluster")
	if err != nil {
		return err
	}
	body, err := x.library.Manifest(x.r.Context(), x.vars["name"], x.vars["version"], x.vars["kind"], q.Get("cluster"))
	if err != nil {
		return err
	}
	return x.send(http.StatusOK, "application/yaml", body)
}
