package mirror

// upload answers what is asked of uploads.
func (x *exchange) upload() error {
	return fail(readOnly, "not yet")
}
