-- Times are Unix seconds, 0 is never. Digests are their bytes, whose length
-- tells the algorithm. A scope is the upstream from whose budget a root is
-- evicted, and null of what is not evicted.

CREATE TABLE upstreams ( -- 1 is the whole store, and has no name
	id           INTEGER PRIMARY KEY,
	name         TEXT NOT NULL UNIQUE,
	repositories INTEGER NOT NULL,
	tags         INTEGER NOT NULL,
	manifests    INTEGER NOT NULL,
	blobs        INTEGER NOT NULL,
	bytes        INTEGER NOT NULL,
	blocks       INTEGER NOT NULL, -- of blobs
	extra        INTEGER NOT NULL  -- of links and directories
);

CREATE TABLE repositories (
	id           INTEGER PRIMARY KEY,
	name         TEXT NOT NULL UNIQUE,
	present      INTEGER NOT NULL, -- 0: there are only pins
	class        TEXT NOT NULL,
	upstream     INTEGER NOT NULL, -- 1 of hosted ones
	created      INTEGER NOT NULL,
	pins         INTEGER NOT NULL,
	tags         INTEGER NOT NULL,
	manifests    INTEGER NOT NULL,
	blobs        INTEGER NOT NULL,
	bytes        INTEGER NOT NULL,
	blocks       INTEGER NOT NULL,
	extra        INTEGER NOT NULL
);

-- Every digest that anything names, with or without bytes.
CREATE TABLE blobs (
	id        INTEGER PRIMARY KEY,
	digest    BLOB NOT NULL UNIQUE,
	size      INTEGER NOT NULL,
	stored    INTEGER NOT NULL,
	touched   INTEGER NOT NULL,
	cold      INTEGER,          -- touched, if there are bytes and it is no manifest
	hashed    INTEGER,          -- null if there are no bytes
	members   INTEGER NOT NULL, -- rows there
	holders   INTEGER NOT NULL, -- of these, linked or a manifest
	manifests INTEGER NOT NULL, -- of these, a manifest
	hosted    INTEGER NOT NULL, -- of these, in hosted repositories
	tags      INTEGER NOT NULL, -- that mean it
	subjects  INTEGER NOT NULL, -- manifests that name it as their subject
	parsed    INTEGER NOT NULL  -- what it refers to is in layers and edges
);
CREATE INDEX blobs_cold ON blobs (cold) WHERE cold IS NOT NULL;
CREATE INDEX blobs_hashed ON blobs (hashed) WHERE hashed IS NOT NULL;

-- What other digests than sha256 are of the bytes that lie under one.
CREATE TABLE aliases (
	digest    BLOB NOT NULL PRIMARY KEY,
	canonical BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX aliases_canonical ON aliases (canonical);

-- Blobs with bytes that nothing refers to.
CREATE TABLE loose (
	digest BLOB NOT NULL PRIMARY KEY,
	blob   INTEGER NOT NULL
) WITHOUT ROWID;

-- What blobs are to repositories. named is how many of a repository's
-- manifests name it, and namers the sum of their ids: the id, if it is one.
CREATE TABLE members (
	repository INTEGER NOT NULL,
	blob       INTEGER NOT NULL,
	linked     INTEGER NOT NULL,
	manifest   INTEGER NOT NULL,
	named      INTEGER NOT NULL,
	namers     INTEGER NOT NULL,
	PRIMARY KEY (repository, blob)
) WITHOUT ROWID;
CREATE INDEX members_blob ON members (blob);

-- How many repositories of an upstream hold a blob.
CREATE TABLE uses (
	blob         INTEGER NOT NULL,
	upstream     INTEGER NOT NULL,
	repositories INTEGER NOT NULL,
	PRIMARY KEY (blob, upstream)
) WITHOUT ROWID;

-- Manifests of repositories. parents are those in the same repository that
-- they go with.
CREATE TABLE manifests (
	repository INTEGER NOT NULL,
	blob       INTEGER NOT NULL,
	since      INTEGER NOT NULL,
	touched    INTEGER NOT NULL,
	tags       INTEGER NOT NULL,
	parents    INTEGER NOT NULL,
	pinned     INTEGER NOT NULL,
	scope      INTEGER,
	PRIMARY KEY (repository, blob)
) WITHOUT ROWID;
CREATE INDEX manifests_blob ON manifests (blob);
CREATE INDEX manifests_cold ON manifests (scope, touched) WHERE scope IS NOT NULL;

CREATE TABLE tags (
	repository INTEGER NOT NULL,
	name       TEXT NOT NULL,
	blob       INTEGER NOT NULL,
	since      INTEGER NOT NULL,
	touched    INTEGER NOT NULL,
	meanings   INTEGER NOT NULL, -- it has had
	pinned     INTEGER NOT NULL,
	kept       INTEGER NOT NULL, -- what it means is pinned
	scope      INTEGER,
	PRIMARY KEY (repository, name)
) WITHOUT ROWID;
CREATE INDEX tags_blob ON tags (blob, repository);
CREATE INDEX tags_cold ON tags (scope, touched) WHERE scope IS NOT NULL;

-- Names are tags and digests.
CREATE TABLE pins (
	repository INTEGER NOT NULL,
	name       TEXT NOT NULL,
	PRIMARY KEY (repository, name)
) WITHOUT ROWID;

-- What manifests refer to, while a repository has them.
CREATE TABLE layers (
	manifest INTEGER NOT NULL,
	blob     INTEGER NOT NULL,
	PRIMARY KEY (manifest, blob)
) WITHOUT ROWID;

-- A child goes with its parent. Kind 1: the parent is an index that names the
-- child; 2: the child names the parent as its subject.
CREATE TABLE edges (
	parent INTEGER NOT NULL,
	kind   INTEGER NOT NULL,
	child  INTEGER NOT NULL,
	PRIMARY KEY (parent, kind, child)
) WITHOUT ROWID;
CREATE INDEX edges_child ON edges (child, kind);

INSERT INTO upstreams VALUES (1, '', 0, 0, 0, 0, 0, 0, 0);
