-- What makes settled pks comparable with those of an earlier run: the cluster, its timeline, the database, the table and its sequence.
-- The table's file is left out: VACUUM FULL gives it a new one and changes no row.
SELECT (pg_control_system()).system_identifier::text, (pg_control_checkpoint()).timeline_id::text,
       (SELECT oid FROM pg_database WHERE datname = current_database())::text, %(table)s::oid::text, %(sequence)s::oid::text
