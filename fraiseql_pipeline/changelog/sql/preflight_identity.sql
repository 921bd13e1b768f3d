-- What makes settled pks comparable with those of an earlier run: the cluster, its timeline, the database, the table, its sequence and the
-- sequence's file, which is another one when it begins anew (TRUNCATE with RESTART IDENTITY). The timeline is that of the WAL: the control file
-- has the old one until the first checkpoint after a failover. The table's file is left out: VACUUM FULL gives it a new one and changes no row.
SELECT (pg_control_system()).system_identifier::text,
       ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int::text,
       (SELECT oid FROM pg_database WHERE datname = current_database())::text, %(table)s::oid::text, %(sequence)s::oid::text,
       pg_relation_filenode(%(sequence)s::oid)::text
