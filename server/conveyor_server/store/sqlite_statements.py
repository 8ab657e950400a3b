"""What a SqliteStore says to SQLite.

Invariant: what a statement is about comes as one value, however many sessions that is: a JSON text of their numbers and
names, and a blob of their bytes, one after the other.
"""

# Many records as one row: the numbers of all as one text, the bytes of all as one value. A blob passes group_concat as
# the bytes that it is.
LOOK = """
SELECT
    json_group_array(json_array(s.id, s.number, s.epoch, s.seq, s.owner, s.runtime, s.expires, length(s.head))),
    CAST(group_concat(s.head, '') AS BLOB)
FROM json_each(:ids) AS wanted CROSS JOIN session AS s ON s.id = wanted.value WHERE s.expires > :now
"""
LISTED = """
SELECT
    json_group_array(json_array(s.id, s.number, s.epoch, s.seq, s.owner, s.runtime, s.expires, length(s.head))),
    CAST(group_concat(s.head, '') AS BLOB)
FROM (
    SELECT * FROM session WHERE id > :after AND id < :behind AND expires > :now AND (:model = '' OR model = :model)
    ORDER BY id LIMIT :limit
) AS s
"""
LISTED_OF_MODEL = LISTED.replace("(:model = '' OR model = :model)", "model = :model")
BODIES = """
SELECT json_group_array(json_array(b.number, length(b.data))), CAST(group_concat(b.data, '') AS BLOB)
FROM json_each(:numbers) AS wanted CROSS JOIN body AS b ON b.number = wanted.value
"""
# Of a batch: [[id, epoch, seq, expires, body at, size, head at, size], ...]; the last two only where there is a head.
FILL = """
INSERT INTO batch
SELECT j.key, s.number, j.value ->> 2, j.value ->> 3, j.value ->> 4, j.value ->> 5, j.value ->> 6, j.value ->> 7,
    CASE WHEN s.number IS NULL OR s.expires <= :now THEN 2
        WHEN s.epoch <> (j.value ->> 1) THEN 1
        WHEN s.seq < (j.value ->> 2) OR (s.seq = (j.value ->> 2) AND (j.value ->> 6) IS NOT NULL) THEN 0
        ELSE -1 END
FROM json_each(:batch) AS j LEFT JOIN session AS s ON s.id = (j.value ->> 0)
"""
PUT_SESSIONS = """
UPDATE session SET seq = b.seq, owner = :owner, runtime = :runtime, expires = b.expires
FROM batch AS b WHERE b.outcome = 0 AND session.number = b.number
"""
# The substr of an empty blob is NULL.
PUT_HEADS = """
UPDATE session SET head = ifnull(substr(:heads, b.head_at + 1, b.head_size), x'')
FROM batch AS b WHERE b.outcome = 0 AND b.head_at IS NOT NULL AND session.number = b.number
"""
# In one pass: an UPDATE would first lay all bodies aside.
PUT_BODIES = """
REPLACE INTO body SELECT b.number, ifnull(substr(:bodies, b.body_at + 1, b.body_size), x'')
FROM batch AS b WHERE b.outcome = 0
"""
# `due` may be too early, which a sweep mends, but not too late: an expiry that moves on changes no index.
PUT_DUE = """
UPDATE session SET due = session.expires
FROM batch AS b WHERE b.outcome = 0 AND session.number = b.number AND session.expires < session.due
"""
REFUSED = "SELECT json_group_array(json_array(position, outcome)) FROM batch WHERE outcome > 0"
TAKE = """
UPDATE session SET epoch = epoch + 1, owner = j.value ->> 1, expires = j.value ->> 2, due = min(due, j.value ->> 2)
FROM json_each(:claims) AS j WHERE session.number = (j.value ->> 0)
"""
CREATE = """
INSERT INTO session (id, model, epoch, seq, owner, runtime, expires, due, quotas, head)
SELECT j.value ->> 0, j.value ->> 1, j.value ->> 11, j.value ->> 2, j.value ->> 3, j.value ->> 4, j.value ->> 5,
    j.value ->> 5, j.value -> 6, ifnull(substr(:heads, (j.value ->> 7) + 1, j.value ->> 8), x'')
FROM json_each(:new) AS j
"""
CREATE_BODIES = """
INSERT INTO body SELECT s.number, ifnull(substr(:bodies, (j.value ->> 9) + 1, j.value ->> 10), x'')
FROM json_each(:new) AS j CROSS JOIN session AS s ON s.id = (j.value ->> 0)
"""
DELETE = "DELETE FROM session WHERE number IN (SELECT value FROM json_each(:numbers))"
DELETE_DEAD = "DELETE FROM session WHERE id IN (SELECT value FROM json_each(:ids)) AND expires <= :now"
SWEEP_ON = """
UPDATE session SET due = expires
WHERE number IN (SELECT number FROM session WHERE due <= :now AND expires > :now LIMIT :most)
"""
SWEEP = """
DELETE FROM session WHERE number IN (SELECT number FROM session WHERE due <= :now AND expires <= :now LIMIT :most)
"""
COUNTED = """
SELECT ifnull((SELECT count FROM quota WHERE key = :key), 0)
    - (SELECT count(*) FROM session WHERE due <= :now AND expires <= :now AND (:model = '' OR model = :model))
"""
COUNTED_OF_TENANT = """
SELECT count(*) FROM session
WHERE id > :first AND id < :behind AND expires > :now AND (:model = '' OR model = :model)
"""
QUOTAS = "SELECT json_group_array(json_array(key, count)) FROM quota WHERE key IN (SELECT value FROM json_each(:keys))"
