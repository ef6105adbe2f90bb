-- (Every query of the daemon, by name. Values come as parameters, never as text.)

-- newest_time
SELECT max(0.0,
  coalesce((SELECT max(arrived_s) FROM study), 0.0),
  coalesce((SELECT max(created_s) FROM job), 0.0),
  coalesce((SELECT max(finished_s) FROM job), 0.0),
  coalesce((SELECT max(lease_until_s) FROM job), 0.0));

-- (Intake)

-- object_bytes
SELECT coalesce(sum(size_bytes), 0) FROM instance WHERE stored;

-- study_by_key
SELECT * FROM study WHERE key = :key;

-- add_study
INSERT INTO study (key, kind, state, revision, changes, arrived_s, due_s, reason)
VALUES (:key, :kind, 'receiving', 0, 0, :now, :now, '');

-- study_arrival
UPDATE study SET state = 'receiving', changes = changes + 1, arrived_s = :now, due_s = :due WHERE id = :study;

-- add_sender
INSERT OR IGNORE INTO sender (study_id, door, calling) VALUES (:study, :door, :calling);

-- open_association
INSERT OR IGNORE INTO association (id, state) VALUES (:id, 'open');

-- close_association
UPDATE association SET state = :state WHERE id = :id;

-- judge_association
UPDATE study SET due_s = min(due_s, :now) WHERE state = 'receiving'
AND id IN (SELECT study_id FROM instance WHERE association = :id);

-- (Associations that were open when the daemon ended were cut off.)
-- abort_associations
UPDATE association SET state = 'aborted' WHERE state = 'open';

-- instances_of_uid
SELECT id, sha256, stored FROM instance WHERE study_id = :study AND uid = :uid;

-- restore_instance
UPDATE instance SET stored = 1 WHERE id = :id AND NOT stored;

-- add_instance
INSERT INTO instance (study_id, uid, sha256, size_bytes, header, name, association, role, stored, arrived_s)
VALUES (:study, :uid, :sha256, :size, :header, :name, :association, :role, 1, :now);

-- (The audit trail)

-- last_event
SELECT seq, line FROM event ORDER BY seq DESC LIMIT 1;

-- event
SELECT seq, line FROM event WHERE seq = :seq;

-- add_event
INSERT INTO event (seq, study_id, job_id, line) VALUES (:seq, :study, :job, :line);

-- events_after
SELECT seq, line FROM event WHERE seq > :seq ORDER BY seq LIMIT :limit;

-- events_of_job
SELECT line FROM event WHERE job_id = :job OR (study_id = :study AND job_id IS NULL) ORDER BY seq;

-- (Exported events of studies that are gone; the last one stays: the next one names its digest.)
-- forget_events
DELETE FROM event WHERE seq < :exported AND seq < (SELECT max(seq) FROM event)
AND (study_id IS NULL OR study_id NOT IN (SELECT id FROM study));

-- (Studies)

-- due_study
SELECT * FROM study WHERE state = 'receiving' AND due_s <= :now ORDER BY due_s LIMIT 1;

-- next_due_study
SELECT min(due_s) FROM study WHERE state = 'receiving';

-- judge_later
UPDATE study SET due_s = :due, reason = :reason WHERE id = :id AND changes = :changes AND state = 'receiving';

-- (Of the content since the last revision.)
-- study_associations
SELECT a.state, count(DISTINCT a.id) AS number FROM instance i JOIN association a ON a.id = i.association
WHERE i.study_id = :study AND i.revision IS NULL AND i.role = 'content' GROUP BY a.state;

-- senders
SELECT door, calling FROM sender WHERE study_id = :study;

-- (The scan as of a revision, or all of it; an order that does not depend on arrival.)
-- content
SELECT * FROM instance WHERE study_id = :study AND role = 'content' AND (:revision IS NULL OR revision <= :revision)
ORDER BY uid, sha256;

-- (Nothing may have arrived since the study was judged.)
-- seal_study
UPDATE study SET state = 'complete', reason = :reason
WHERE id = :id AND state = 'receiving' AND changes = :changes;

-- revision
SELECT * FROM revision WHERE study_id = :study AND number = :number;

-- add_revision
INSERT INTO revision (study_id, number, digest, reason, sealed_at) VALUES (:study, :number, :digest, :reason, :at);

-- stamp_instances
UPDATE instance SET revision = :number WHERE study_id = :study AND revision IS NULL;

-- stamp_study
UPDATE study SET revision = :number WHERE id = :study;

-- jobs_to_supersede
SELECT id, state FROM job WHERE study_id = :study AND revision < :number AND state <> 'superseded';

-- supersede_job
UPDATE job SET state = 'superseded', lease = NULL, lease_until_s = NULL, finished_at = coalesce(finished_at, :at),
finished_s = :now WHERE id = :id;

-- cancel_deliveries
UPDATE delivery SET state = 'cancelled', finished_at = :at WHERE job_id = :job AND state IN ('pending', 'failed');

-- job_of_route
SELECT id FROM job WHERE study_id = :study AND revision = :revision AND route = :route;

-- (The result that a new one replaces: the newest that went out.)
-- result_before
SELECT j.id FROM job j WHERE j.study_id = :study AND j.revision < :revision AND j.route = :route AND j.refused = 0
AND EXISTS (SELECT 1 FROM delivery d WHERE d.job_id = j.id AND d.state = 'sent') ORDER BY j.revision DESC LIMIT 1;

-- add_job
INSERT INTO job (id, study_id, revision, route, entry, outputs, send_refusals, priority, supersedes, state, code,
  message, created_s, created_at, due_s)
VALUES (:id, :study, :revision, :route, :entry, :outputs, :send_refusals, :priority, :supersedes, :state, :code,
  :message, :now, :at, :now);

-- add_delivery
INSERT INTO delivery (job_id, destination, state) VALUES (:job, :destination, 'pending');

-- (Jobs)

-- claim_job
UPDATE job SET state = 'running', lease = :lease, lease_until_s = :until, attempts = attempts + 1
WHERE id = (SELECT id FROM job WHERE state = 'queued' AND due_s <= :now ORDER BY priority DESC, created_s, id LIMIT 1)
RETURNING *;

-- next_due_job
SELECT min(due_s) FROM job WHERE state = 'queued';

-- study
SELECT * FROM study WHERE id = :id;

-- extend_lease
UPDATE job SET lease_until_s = :until WHERE id = :id AND lease = :lease AND state = 'running';

-- leased_job
SELECT * FROM job WHERE id = :id AND lease = :lease AND state = 'running';

-- finish_job
UPDATE job SET state = :state, lease = NULL, lease_until_s = NULL, code = :code, message = :message,
  refused = :refused, files = :files, seconds = :seconds, finished_s = :now,
  finished_at = CASE :state WHEN 'refused' THEN :at END
WHERE id = :id AND lease = :lease AND state = 'running';

-- release_job
UPDATE job SET state = 'queued', lease = NULL, lease_until_s = NULL, attempts = attempts - 1, due_s = :now
WHERE id = :id AND lease = :lease AND state = 'running';

-- running_jobs
SELECT * FROM job WHERE state = 'running';

-- expired_jobs
SELECT * FROM job WHERE state = 'running' AND lease_until_s < :now;

-- count_interruption
UPDATE job SET interruptions = interruptions + 1 WHERE id = :id;

-- put_back_job
UPDATE job SET state = :state, lease = NULL, lease_until_s = NULL, due_s = :due, crashes = crashes + :crashes,
  code = :code, message = :message WHERE id = :id;

-- close_job
UPDATE job SET state = :state, code = :code, message = :message, finished_at = :at, finished_s = :now
WHERE id = :id AND state = 'delivering';

-- (Deliveries)

-- due_delivery
SELECT d.job_id, d.destination, d.attempts, j.study_id, j.files, j.refused, j.code, j.message, s.key
FROM delivery d JOIN job j ON j.id = d.job_id JOIN study s ON s.id = j.study_id
WHERE d.destination = :destination AND d.state = 'pending' AND d.due_s <= :now AND j.state = 'delivering'
ORDER BY j.priority DESC, j.created_s LIMIT 1;

-- destinations_in_use
SELECT DISTINCT d.destination FROM delivery d JOIN job j ON j.id = d.job_id
WHERE d.state = 'pending' AND j.state = 'delivering';

-- delivery_sent
UPDATE delivery SET state = 'sent', attempts = attempts + 1, code = '', message = '', committed = :committed,
  finished_at = :at WHERE job_id = :job AND destination = :destination AND state IN ('pending', 'cancelled');

-- delivery_failed
UPDATE delivery SET state = :state, attempts = attempts + 1, due_s = :due, code = :code, message = :message
WHERE job_id = :job AND destination = :destination AND state = 'pending';

-- delivery_states
SELECT state, count(*) AS number FROM delivery WHERE job_id = :job GROUP BY state;

-- failed_delivery
SELECT code, message FROM delivery WHERE job_id = :job AND state = 'failed' ORDER BY destination LIMIT 1;

-- (Retention)

-- object_needed
SELECT 1 FROM instance WHERE sha256 = :sha256 AND stored LIMIT 1;

-- stored_objects
SELECT sha256 FROM instance WHERE stored;

-- jobs_with_files
SELECT id FROM job WHERE files <> '{}';

-- (Studies whose last job ended long ago, and that still have objects.)
-- studies_to_empty
SELECT s.* FROM study s WHERE s.state = 'complete' AND s.arrived_s < :before
AND EXISTS (SELECT 1 FROM instance i WHERE i.study_id = s.id AND i.stored)
AND NOT EXISTS (SELECT 1 FROM job j WHERE j.study_id = s.id
  AND (j.state NOT IN ('done', 'refused', 'superseded') OR j.finished_s > :before));

-- finished_studies
SELECT s.* FROM study s WHERE s.state = 'complete' AND s.arrived_s < :before
AND NOT EXISTS (SELECT 1 FROM job j WHERE j.study_id = s.id
  AND (j.state NOT IN ('done', 'refused', 'superseded') OR j.finished_s > :before));

-- quarantined_studies
SELECT s.* FROM study s WHERE s.state = 'complete' AND s.arrived_s < :before
AND EXISTS (SELECT 1 FROM job j WHERE j.study_id = s.id AND j.state = 'quarantined')
AND NOT EXISTS (SELECT 1 FROM job j WHERE j.study_id = s.id
  AND (j.state IN ('queued', 'running', 'delivering') OR max(j.due_s, coalesce(j.finished_s, 0.0)) > :before));

-- (Not while a job is under way: what was asked for may have come again.)
-- studies_to_purge
SELECT s.* FROM study s WHERE s.purge AND NOT EXISTS (
  SELECT 1 FROM job j WHERE j.study_id = s.id AND j.state IN ('queued', 'running', 'delivering'));

-- objects_of_study
SELECT DISTINCT sha256 FROM instance WHERE study_id = :study AND stored;

-- jobs_of_study
SELECT id, state FROM job WHERE study_id = :study;

-- delete_study
DELETE FROM study WHERE id = :study;

-- forget_objects
UPDATE instance SET stored = 0 WHERE study_id = :study;

-- forget_associations
DELETE FROM association WHERE state <> 'open' AND id NOT IN (
  SELECT association FROM instance WHERE association IS NOT NULL);

-- (For the operator)

-- list_jobs
SELECT j.*, s.key FROM job j JOIN study s ON s.id = j.study_id WHERE :state IS NULL OR j.state = :state
ORDER BY j.state = 'quarantined' DESC, j.created_s DESC, j.id LIMIT :limit;

-- receiving_studies
SELECT s.key, s.reason, (SELECT count(*) FROM instance i WHERE i.study_id = s.id) AS objects
FROM study s WHERE s.state = 'receiving' ORDER BY s.arrived_s;

-- jobs_like
SELECT j.*, s.key FROM job j JOIN study s ON s.id = j.study_id WHERE j.id GLOB :name || '*' LIMIT 10;

-- deliveries_of_job
SELECT * FROM delivery WHERE job_id = :job ORDER BY destination;

-- conflicts
SELECT sha256 FROM instance WHERE study_id = :study AND role = 'conflict' ORDER BY id;

-- retry_job
UPDATE job SET state = :state, due_s = :now, attempts = 0, crashes = 0, interruptions = 0, code = '', message = '',
  finished_at = NULL WHERE id = :id;

-- retry_deliveries
UPDATE delivery SET state = 'pending', due_s = 0, attempts = 0 WHERE job_id = :job AND state IN ('failed', 'cancelled');

-- (The job runs again, and its result goes to every destination.)
-- renew_deliveries
UPDATE delivery SET state = 'pending', due_s = 0, attempts = 0, finished_at = NULL WHERE job_id = :job;

-- quarantine_job
UPDATE job SET state = 'quarantined', lease = NULL, lease_until_s = NULL, code = 'operator',
  message = 'an operator stopped it' WHERE id = :id;

-- mark_purged
UPDATE study SET purge = 1 WHERE id = :study;

-- (For health)

-- study_states
SELECT state, count(*) AS number FROM study GROUP BY state;

-- job_states
SELECT state, count(*) AS number FROM job GROUP BY state;

-- all_delivery_states
SELECT d.destination, d.state, count(*) AS number FROM delivery d GROUP BY d.destination, d.state;

-- oldest_queued
SELECT min(created_s) FROM job WHERE state = 'queued';
