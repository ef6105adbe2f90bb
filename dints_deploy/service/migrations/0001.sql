-- The first schema. Times ending in _s are seconds of the appliance's own clock, times ending in _at UTC text.

CREATE TABLE clock (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  boot TEXT NOT NULL,           -- the kernel's name of this boot
  offset_s REAL NOT NULL        -- appliance seconds = seconds since boot + offset
) STRICT;

CREATE TABLE study (
  id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: the audit trail refers to it
  key TEXT NOT NULL UNIQUE,     -- digest of the StudyInstanceUID, or of a NIfTI file's name and bytes
  kind TEXT NOT NULL CHECK (kind IN ('dicom', 'nifti')),
  state TEXT NOT NULL CHECK (state IN ('receiving', 'complete')),
  revision INTEGER NOT NULL,    -- of the last seal; 0 before the first
  changes INTEGER NOT NULL,     -- counts arrivals: a judgement about an older count is void
  arrived_s REAL NOT NULL,      -- of the newest arrival
  due_s REAL NOT NULL,          -- when to judge
  reason TEXT NOT NULL          -- the last verdict's
) STRICT;
CREATE INDEX study_due ON study (due_s) WHERE state = 'receiving';

CREATE TABLE sender (           -- who brought a study, and through which door
  study_id INTEGER NOT NULL REFERENCES study ON DELETE CASCADE,
  door TEXT NOT NULL,
  calling TEXT NOT NULL,
  PRIMARY KEY (study_id, door, calling)
) STRICT, WITHOUT ROWID;

CREATE TABLE association (
  id TEXT PRIMARY KEY,
  state TEXT NOT NULL CHECK (state IN ('open', 'released', 'aborted'))
) STRICT, WITHOUT ROWID;

CREATE TABLE instance (
  id INTEGER PRIMARY KEY,
  study_id INTEGER NOT NULL REFERENCES study ON DELETE CASCADE,
  uid TEXT NOT NULL,            -- SOPInstanceUID; empty for NIfTI
  sha256 TEXT NOT NULL,
  size_bytes INTEGER NOT NULL,
  header TEXT NOT NULL,         -- JSON of dicom.instance.Instance; empty for NIfTI
  name TEXT NOT NULL,           -- file name of a NIfTI file
  association TEXT,
  role TEXT NOT NULL CHECK (role IN ('content', 'extra', 'conflict')),
  revision INTEGER,             -- the first one that has it; NULL before a seal
  stored INTEGER NOT NULL,      -- 0 once retention removed the object
  arrived_s REAL NOT NULL,
  UNIQUE (study_id, uid, sha256)
) STRICT;
CREATE INDEX instance_object ON instance (sha256);
CREATE INDEX instance_association ON instance (association);

CREATE TABLE revision (
  study_id INTEGER NOT NULL REFERENCES study ON DELETE CASCADE,
  number INTEGER NOT NULL,
  digest TEXT NOT NULL,         -- of the digests of its content
  reason TEXT NOT NULL,         -- the evidence that it was complete
  sealed_at TEXT NOT NULL,
  PRIMARY KEY (study_id, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE job (
  id TEXT PRIMARY KEY,          -- digest of study, content, route, entry and outputs
  study_id INTEGER NOT NULL REFERENCES study ON DELETE CASCADE,
  revision INTEGER NOT NULL,
  route TEXT NOT NULL,
  entry TEXT NOT NULL,
  outputs TEXT NOT NULL,        -- JSON list
  send_refusals INTEGER NOT NULL,
  priority INTEGER NOT NULL,
  supersedes TEXT,              -- the job whose result this one's replaces
  state TEXT NOT NULL,
  created_s REAL NOT NULL,
  created_at TEXT NOT NULL,
  due_s REAL NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,        -- of the worker, while the daemon lived
  interruptions INTEGER NOT NULL DEFAULT 0,  -- the daemon ended while it ran
  lease TEXT,
  lease_until_s REAL,
  code TEXT NOT NULL DEFAULT '',
  message TEXT NOT NULL DEFAULT '',
  refused INTEGER NOT NULL DEFAULT 0,        -- its files are a refusal
  files TEXT NOT NULL DEFAULT '{}',          -- JSON: file name -> SHA-256, in results/<id>/
  finished_at TEXT,
  finished_s REAL,
  UNIQUE (study_id, revision, route)
) STRICT, WITHOUT ROWID;
CREATE INDEX job_state ON job (state, due_s);

CREATE TABLE delivery (
  job_id TEXT NOT NULL REFERENCES job ON DELETE CASCADE,
  destination TEXT NOT NULL,
  state TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  due_s REAL NOT NULL DEFAULT 0,
  code TEXT NOT NULL DEFAULT '',
  message TEXT NOT NULL DEFAULT '',
  committed INTEGER NOT NULL DEFAULT 0,      -- the destination promised to keep it
  finished_at TEXT,
  PRIMARY KEY (job_id, destination)
) STRICT, WITHOUT ROWID;
CREATE INDEX delivery_state ON delivery (destination, state, due_s);

CREATE TABLE event (            -- the audit trail, before it is exported to its file
  seq INTEGER PRIMARY KEY,
  study_id INTEGER,
  job_id TEXT,
  line TEXT NOT NULL            -- JSON with the SHA-256 of the line before
) STRICT;
CREATE INDEX event_job ON event (job_id);
CREATE INDEX event_study ON event (study_id);
