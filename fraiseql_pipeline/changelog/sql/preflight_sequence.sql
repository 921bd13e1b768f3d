-- The sequence the pk is drawn from: an identity column's own, or the one in the column's default. One that the column only owns is not drawn
-- from. Looked up in the catalog: pg_get_serial_sequence() needs rights on the table.
WITH pk AS (
    SELECT attrelid, attnum FROM pg_attribute WHERE attrelid = %(table)s AND attname = 'pk_entity_change_log'
), found AS (
    SELECT d.objid AS sequence
      FROM pk JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = pk.attrelid AND d.refobjsubid = pk.attnum
                              AND d.classid = 'pg_class'::regclass AND d.deptype = 'i'
    UNION
    SELECT d.refobjid
      FROM pk JOIN pg_attrdef f ON f.adrelid = pk.attrelid AND f.adnum = pk.attnum
              JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
)
SELECT s.seqrelid, s.seqcache, s.seqincrement, s.seqcycle, s.seqmin, has_sequence_privilege(s.seqrelid, 'SELECT') AS readable,
       format('%%I.%%I', n.nspname, c.relname) AS name
  FROM found JOIN pg_sequence s ON s.seqrelid = found.sequence
             JOIN pg_class c ON c.oid = s.seqrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace
