-- Prepared transactions of this database, oldest first.
SELECT gid, owner::text AS owner, prepared FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared
