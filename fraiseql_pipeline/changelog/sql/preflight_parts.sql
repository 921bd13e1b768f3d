-- Parts of the change log, children of any depth, whose own key is drawn from elsewhere than the sequence of the whole: it has an identity of
-- its own, or a default that is not exactly that sequence. One without either has its keys from the whole, or from who inserts into it.
WITH RECURSIVE part AS (
    SELECT inhrelid AS oid FROM pg_inherits WHERE inhparent = %(table)s
    UNION
    SELECT i.inhrelid FROM pg_inherits i JOIN part ON part.oid = i.inhparent
), pk AS (
    SELECT a.attrelid, a.attnum, a.atthasdef FROM part JOIN pg_attribute a ON a.attrelid = part.oid AND a.attname = 'pk_entity_change_log'
), drawn AS (
    SELECT pk.attrelid, d.objid AS sequence, true AS identity
      FROM pk JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = pk.attrelid AND d.refobjsubid = pk.attnum
                              AND d.classid = 'pg_class'::regclass AND d.deptype = 'i'
    UNION
    SELECT pk.attrelid, s.seqrelid, false
      FROM pk JOIN pg_attrdef f ON f.adrelid = pk.attrelid AND f.adnum = pk.attnum
              LEFT JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
                                   AND d.refobjid <> pk.attrelid
              LEFT JOIN pg_sequence s ON s.seqrelid = d.refobjid
)
SELECT format('%%I.%%I', n.nspname, c.relname) AS name, bool_or(drawn.identity) AS identity
  FROM drawn JOIN pg_class c ON c.oid = drawn.attrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE drawn.sequence IS DISTINCT FROM %(sequence)s
 GROUP BY 1 ORDER BY 1
