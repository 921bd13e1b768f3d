-- Keys for so many sample events, drawn at once from both sequences; the lock keeps writers out between the look and the set.
-- Returns the last key of each sequence before.
SELECT drawn.pk, drawn.seq,
       setval(%(pk_sequence)s::regclass, drawn.pk + %(events)s), setval(%(seq_sequence)s::regclass, drawn.seq + %(events)s)
  FROM (SELECT nextval(%(pk_sequence)s::regclass) AS pk, nextval(%(seq_sequence)s::regclass) AS seq) AS drawn
