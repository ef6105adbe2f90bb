-- How long the stages of a job took; removal that an operator asked for while the daemon runs.

ALTER TABLE job ADD COLUMN seconds TEXT NOT NULL DEFAULT '{}';  -- JSON: stage -> seconds
ALTER TABLE study ADD COLUMN purge INTEGER NOT NULL DEFAULT 0;
