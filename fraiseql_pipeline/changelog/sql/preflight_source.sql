-- What the source is: one row whatever exists. Readable by every role.
WITH RECURSIVE log AS (
    SELECT oid, relkind, relnamespace FROM pg_class WHERE relname = 'tb_entity_change_log' AND relnamespace = to_regnamespace('core')
), part AS (
    SELECT oid FROM log UNION ALL SELECT i.inhrelid FROM pg_inherits i JOIN part ON part.oid = i.inhparent
), unindexed AS (
    SELECT needed.attname, min(part.oid::regclass::text) AS part
      FROM part JOIN pg_class p ON p.oid = part.oid AND p.relkind = 'r'
           JOIN pg_attribute needed ON needed.attrelid = part.oid AND needed.attname IN ('created_at', 'pk_entity_change_log')
     WHERE NOT EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
                        WHERE i.indrelid = part.oid AND i.indisvalid AND i.indpred IS NULL AND i.indkey[0] = needed.attnum AND m.amname = 'btree')
     GROUP BY needed.attname
)
SELECT pg_is_in_recovery()                                          AS standby,
       current_user::text                                           AS role,
       to_regnamespace('core') IS NOT NULL                          AS has_schema,
       c.oid                                                        AS table_oid,
       c.relkind::text                                              AS kind,
       row_security_active(c.oid)                                   AS filtered,
       has_schema_privilege(c.relnamespace, 'USAGE')                AS may_use_schema,
       has_table_privilege(c.oid, 'SELECT')                         AS may_read,
       EXISTS (SELECT FROM part JOIN pg_class p ON p.oid = part.oid WHERE p.relkind = 'f') AS has_foreign_part,
       EXISTS (SELECT FROM part JOIN pg_class p ON p.oid = part.oid WHERE p.relkind = 'r' AND p.relpersistence = 'u') AS unlogged,
       (SELECT min(s.subname::text) FROM part JOIN pg_subscription_rel f ON f.srrelid = part.oid
                                              JOIN pg_subscription s ON s.oid = f.srsubid AND s.subenabled) AS subscription,
       pg_has_role('pg_read_all_stats', 'USAGE')                    AS may_see_sessions,
       current_setting('track_activities')::boolean                 AS tracks_sessions,
       (SELECT array_agg(p.polname::text ORDER BY p.polname) FROM pg_policy p WHERE p.polrelid = c.oid) AS policies,
       (SELECT pg_encoding_to_char(d.encoding) = 'SQL_ASCII' FROM pg_database d
         WHERE d.datname = current_database())                       AS unencoded,
       current_setting('quote_all_identifiers')::boolean            AS quotes_all,
       current_database()::text                                     AS database,
       (SELECT jsonb_object_agg(attname, part) FROM unindexed)      AS unindexed
  FROM (SELECT 1) AS one
  LEFT JOIN log AS c ON true
