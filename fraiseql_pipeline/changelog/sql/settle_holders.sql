-- Transactions that may still commit a row whose pk is drawn: nextval() takes RowExclusiveLock on the sequence before it draws and the top
-- transaction keeps it to its end, through savepoints and PREPARE. The locks on the table and its parts, children of any depth, cover writers
-- that bring a key of their own. Readable by every role; not cached within a transaction.
WITH RECURSIVE log AS (
    SELECT 'core.tb_entity_change_log'::regclass::oid AS oid
    UNION
    SELECT i.inhrelid FROM pg_inherits i JOIN log ON log.oid = i.inhparent
)
SELECT DISTINCT l.virtualtransaction AS holder, l.pid
  FROM pg_locks l
 WHERE l.locktype = 'relation' AND l.granted
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
   AND (l.relation IN (SELECT oid FROM log) OR l.relation = %(sequence)s::oid)
