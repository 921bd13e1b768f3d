-- Transactions that may still commit a row whose pk is drawn: nextval() takes RowExclusiveLock on the sequence before it draws and the top
-- transaction keeps it to its end, through savepoints and PREPARE. The table's own lock covers writers that bring a key of their own.
-- Readable by every role; not cached within a transaction.
SELECT DISTINCT l.virtualtransaction AS holder, l.pid
  FROM pg_locks l
 WHERE l.locktype = 'relation' AND l.granted
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
   AND l.relation IN (SELECT relid FROM pg_partition_tree('core.tb_entity_change_log') -- no row for a plain table
                      UNION SELECT 'core.tb_entity_change_log'::regclass
                      UNION SELECT %(sequence)s::oid)
