// Package s3 is the guest module registry.storage.s3: a store whose values are the
// objects of an S3 bucket, with a local disk before it.
//
// Three things make it up. The bucket is what S3 has. The near tier is a store of
// package disk in the cache directory: it has the values that are not in the bucket
// yet, and copies of blobs that are. The index is what is known of the bucket. The
// truth is the near tier's pending values, and below them the bucket; the index may be
// lost at any time.
//
// # The states of a value
//
//	absent     neither here nor there
//	pending    a near file, newer than whatever the bucket has under the key
//	far        in the bucket, and nothing near
//	both       in the bucket, and a near copy (blobs only)
//	unproven   a near blob of which it is not known whether the bucket has it
//
// Put and PutFile make pending of everything, but that a blob that the index has with
// that size becomes both, and a value that the index has byte for byte stays as it is,
// while nobody else uses the bucket.
// An upload makes both of a pending blob, and far of any other pending value: small
// ones lie in the index itself from then on. Eviction and Drop make far of both.
// Reading makes both of far, if the one who reads puts what it has read; Get does so
// itself for blobs. Delete makes absent of everything. Opening without an index that
// can be believed makes pending of every near value but blobs, and unproven of those;
// the end of the listing makes both or pending of them. Until then nothing but blobs is
// uploaded, unless somebody waits for it. Sync makes pending of an
// unproven blob at once.
//
// Nothing is written down of which near values are pending: it is found out at each
// start, by comparing the near files with the index. A near value that is no blob is
// always pending, since its file goes when it is in the bucket.
//
// # Who changes a value
//
// Keys fall into stripes. A stripe's lock guards the states of its keys, and what is
// done to their near files: whoever puts, removes or replaces one holds it, so that
// file and state agree. It is never held during a call to S3. Readers of blobs do not
// take it: a near file under a blob's key is that blob, whatever else is going on.
//
// A key has one slot, for uploads and deletions. Who has it may call S3 and write the
// key's entry; others wait for its end. Within a slot:
//
// An upload notes the generation of the value, sends it, writes the entry, and only
// then, if the generation is still the same, ends pending and removes the near file
// of a small value. If it is not, the value has been put anew meanwhile, and is
// uploaded again. Two who sync one key share an upload that way: the second waits for
// the slot and finds nothing left to do.
//
// A deletion waits for the upload that has the slot; one in parts gives way at once. It
// never cuts a call off in which a value is sent whole, or its parts are made one: that
// might come to the bucket after it. It marks
// the entry unsure, deletes the object, removes the entry, and then the near file, unless the
// value has been put anew meanwhile. An object is deleted without asking unless the
// index is sure that there is none, and no upload was ever begun.
//
// A call that is cut, by the network, by Close or by a kill, may still be carried out
// later. If what was being stored has been deleted since, the index remembers, over
// restarts, that it may come back; ten minutes after the deletion it is deleted again,
// unless it has been put anew, or the index has been made again or somebody else has used
// the bucket meanwhile. Whatever comes later than that, or after one of these, is in the
// bucket until somebody deletes it again, and is seen at the next listing. A
// deletion that is cut marks its entry unsure, but nothing is known here that could tell
// when it can no longer come behind a value that is put anew.
//
// What a reader learns of S3 is written down if nothing has been put or deleted in the
// stripe since before it asked, which the stripe's version tells.
//
// The order of locks: a stripe, then the queue, the index, or the budget. These three
// do not nest.
//
// # Where a process may die
//
//	s3.put.near   the near file is there: pending at the next start
//	s3.uploading  nothing is sent: as before
//	s3.part       a part is sent and in the ledger: the next upload goes on behind it
//	s3.uploaded   the bucket has it, the index does not know: sent again, to no harm
//	s3.indexed    the near file of a small value is still there: sent again
//	s3.deleting   the entry is unsure: whoever wants it asks S3
//	s3.deleted    the object is gone, and the entry unsure
//	s3.deleted.again
//	              what may have come late is gone; it is deleted once more, to no harm
//	s3.listed     a part of the listing is in the index: it is done again from the start
//
// # When another process writes to the bucket
//
// Each store leaves a mark in the bucket. While there is another's, the store asks S3
// again for what it has not asked in the last two seconds, but for blobs it has seen,
// and lists there. When the other's mark is gone the bucket is listed, and the index is
// believed again. A mark that was there before the store, and has not been renewed since,
// may be that of a process that was killed: as long as S3 does not answer, the store then
// goes by what it knows. Ten minutes after any such listing there is a second one, for what
// the first missed of others because it lagged.
package s3
