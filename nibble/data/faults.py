"""Every way in which a data file or a row can be wrong: one line each, reason and fix.

A reason is a sentence with the particulars in braces; `fault` fills them in and adds the place.
"""

from nibble.errors import DataError

# Particulars come from the file, which may hold a name of a megabyte.
MAX_SHOWN_CHARS = 300

# name: (what is wrong and what was expected, what to do about it)
FAULTS: dict[str, tuple[str, str]] = {
    # the file
    "missing-file": ("there is no such file{hint}", "check the path"),
    "is-folder": ("this is a folder, expected a file", "name one file in it: {files}"),
    "not-regular": (
        "this is a pipe or a device, expected a file",
        "write the rows to a file and name that",
    ),
    "packed-file": ("the file is packed ({found}), expected plain rows", "unpack it first"),
    "unreadable-file": ("the file cannot be read: {why}", "check its permissions"),
    "unknown-suffix": (
        'the ending "{suffix}" is not known, expected one of {known}',
        "convert the file, or rename it to what it holds",
    ),
    "empty-file": ("the file is empty, expected at least one row", "put examples into it"),
    "no-rows": ("the file holds no rows, expected at least one", "put examples into it"),
    "utf16": ("the file is UTF-16 or UTF-32, expected UTF-8", "save it as UTF-8"),
    "bad-utf8": (
        "byte {column} of the line is not UTF-8 (0x{byte:02x})",
        "save the file as UTF-8, for example: iconv -f latin1 -t utf-8",
    ),
    "inner-bom": (
        "a byte order mark stands at the start of the line, expected at most one in the file",
        "remove it: two files were joined here",
    ),
    "long-line": (
        "the line is longer than {limit:,} bytes",
        "split the row, or write the file as an array in .json",
    ),
    "nul": ("{where} holds a NUL character", "remove it: text has no use for it"),
    "lone-surrogate": (
        "{where} holds half of a surrogate pair (\\u{code:04x}), which is no character",
        "write the character itself, or both halves",
    ),
    # JSON
    "bad-json": ("column {column}: {why}", "correct the JSON at that place; one object a line"),
    "several-values": (
        "column {column}: something follows the object, expected one object a line",
        "put each object on its own line",
    ),
    "json-too-deep": (
        "the JSON is nested too deeply: more than {limit} levels",
        "flatten the row",
    ),
    "json-number": ('"{value}" is not JSON', "write null, or a text"),
    "huge-number": ("a number has too many digits", "write it as a text"),
    "duplicate-key": ('the key "{key}" stands twice in one object', "keep one of them"),
    "not-array": (
        'the top level is {found}, expected an array of rows or an object with "data"',
        'write [row, row, ...] or {{"data": [row, ...]}}',
    ),
    "array-not-closed": ("the array is not closed by ]", "the file is cut off: write it again"),
    "array-comma": ("column {column}: expected a comma or ] after a row", "correct the JSON there"),
    "trailing-text": ("column {column}: text after the end of the array", "remove it"),
    # CSV
    "bad-csv": (
        "the CSV is broken: the row that begins here fails in line {seen}: {why}",
        "check the quotes around this row",
    ),
    "csv-no-name": ("column {column} of the header has no name", "name every column"),
    "csv-same-name": ('two columns are called "{key}"', "rename one"),
    "csv-fields": (
        "the row has {found} fields, expected {expected} as in the header",
        'put fields that hold a comma between quotes ("...")',
    ),
    "csv-delimiter": (
        'the header is one column "{key}", expected columns split by a comma',
        "save with commas, or as .tsv with tabs",
    ),
    # Parquet
    "bad-parquet": ("this is not a Parquet file that can be read: {why}", "write it again"),
    "bad-parquet-row": ("a value of the row cannot be read: {why}", "correct it or remove the row"),
    "parquet-same-name": ('two columns are called "{key}"', "rename one"),
    # the row
    "not-object": (
        "the row is {found}, expected an object",
        'write {{"messages": [...]}} or another known format',
    ),
    "empty-row": ("the row has no fields", "remove it or fill it"),
    "unknown-columns": (
        "no known format has the columns {columns}{hint}",
        "rename the columns to messages | conversations | instruction, output | "
        "prompt, completion | text",
    ),
    "preference-row": (
        "the row is a preference pair ({columns}), expected one answer",
        "keep the chosen answer and name it completion",
    ),
    "ambiguous-columns": (
        "several columns could be the {what}: {columns}",
        "rename the right ones to prompt and completion and remove the others",
    ),
    "mixed-formats": (
        "the row is {found} but line {first_line} is {first}: one file has one format",
        "split the file by format, or convert the rows to one",
    ),
    "wrong-format": (
        "the row has the columns {columns}, expected {expected} (format {format})",
        "rename the columns or set data.format to what the file holds",
    ),
    "unknown-format": ('the format "{format}" is not known{hint}', "use one of: {known}"),
    "null-field": ('the field "{field}" is null, expected a text', "fill it or remove the row"),
    "wrong-type": (
        'the field "{field}" is {found}, expected {expected}',
        "write it as {expected}",
    ),
    "empty-field": ('the field "{field}" is empty', "fill it or remove the row"),
    "no-messages": ('the list "{field}" is empty, expected turns', "add turns or remove the row"),
    "turn-not-object": (
        "turn {turn} is {found}, expected an object",
        "write a role and a content for each turn",
    ),
    "missing-role": ('turn {turn} has no "{field}"', "say who speaks: user, assistant, system"),
    "unknown-role": (
        'turn {turn} has the unknown role "{role}"{hint}',
        "use one of: {known}",
    ),
    "missing-content": ('turn {turn} has no "{field}"', "add the text of the turn"),
    "foreign-keys": (
        'turn {turn} has the keys {columns}, expected "{role_key}" and "{text_key}"',
        "rename the keys, or put the list under {other}",
    ),
    "empty-turn": ("turn {turn} ({role}) has no text", "fill it or remove the row"),
    "bad-part": (
        "turn {turn} holds a part of type {found}, expected only text",
        "remove images and audio: the model reads text",
    ),
    "bad-weight": ("turn {turn} has the weight {found}, expected 0 or 1", "write 0 or 1"),
    "weight-not-assistant": (
        "turn {turn} ({role}) has a weight, expected it on assistant turns only",
        "remove it: other turns are never trained",
    ),
    "too-many-turns": (
        'the list "{field}" has {found:,} turns, more than {limit:,}',
        "split the conversation",
    ),
    "not-finite": ("{where} holds a number that is not finite", "write null, or a text"),
    "foreign-value": (
        "{where} holds a value of type {found}, expected what JSON has",
        "write it as a text",
    ),
    "bad-tool-calls": ('turn {turn}: "tool_calls" is wrong: {why}', "write them as OpenAI does"),
    "calls-not-assistant": (
        "turn {turn} ({role}) has tool calls, expected them on assistant turns only",
        "move them to the assistant's turn",
    ),
    "no-assistant": (
        "the conversation has no assistant turn, so there is nothing to learn",
        "add the answer or remove the row",
    ),
    "bad-tools": ('"tools" is {found}, expected a list of objects', "write them as OpenAI does"),
    "bad-history": (
        '"history" is wrong, expected a list of [question, answer] pairs of texts',
        "write pairs of texts",
    ),
    "bad-cell": (
        'the cell "{field}" is not JSON that a row may hold: {why}',
        "write the turns as a JSON list",
    ),
    # questions with choices
    "no-choices": (
        "the row has the columns {columns}, expected a question, its choices and the right one",
        "write question, choices (a list of texts) and answer (number from 0, or text)",
    ),
    "few-choices": (
        'the list "{field}" has {found} choices, expected two at least',
        "add choices or remove the row",
    ),
    "label-count": (
        "there are {num_labels} labels for {num_choices} choices",
        "write one label a choice",
    ),
    "wrong-choice": (
        'the field "{field}" is {found}, which names none of the {num_choices} choices, or several',
        "write the number of the right choice from 0, its label, or its text",
    ),
    # questions with one answer
    "no-question": (
        "the row is plain text, expected a question and its answer",
        "use rows with turns, or measure the loss of it",
    ),
    "no-number": (
        "the answer holds no number, and numbers are compared",
        "leave --last-number out, or remove the row",
    ),
    # the template
    "control-token": (
        '{where} holds "{token}", which the model reads as a sign between turns, not as text',
        "remove it, or write it with a space inside",
    ),
    "template-refuses": (
        "the model's chat template does not take this conversation: {why}",
        "change the turns to what the model was made for, or remove the row",
    ),
    "template-hides": (
        "the model's chat template leaves out turn {turn} (assistant), which should be trained",
        "give that turn weight 0, or set data.train_on=last",
    ),
    "private-characters": (
        "the row uses characters of both private planes of Unicode, which mark the answers",
        "remove the characters above U+F0000",
    ),
    # the whole
    "cannot-split": (
        "data.eval = {fraction} holds out a part of {found} different examples, expected two",
        "add examples, or name a file with data.eval",
    ),
    "too-long": (
        "the row has {found} tokens, more than data.max_seq_len = {limit}",
        "raise data.max_seq_len, or set data.on_long_row to truncate or drop",
    ),
    "no-target": (
        "no token of the data is a target: {why}",
        "check data.train_on and the weights, or raise data.max_seq_len; "
        "`nibble data check` shows the rows",
    ),
}


def fault(name: str, *, path: str = "", line: int = 0, **particulars: object) -> DataError:
    """The error for a fault of the table.

    >>> print(fault("empty-row", path="a.jsonl", line=3))
    a.jsonl:3: the row has no fields
      fix: remove it or fill it
    """
    reason, fix = FAULTS[name]
    shown = {key: _shown(value) for key, value in particulars.items()}
    path = path.encode("utf-8", "backslashreplace").decode()
    error = DataError(reason.format(**shown), path=path, line=line, fix=fix.format(**shown))
    error.add_note(name)
    return error


def _shown(value: object) -> object:
    """A particular as a person may see it: short, and nothing that a terminal obeys."""
    if isinstance(value, int | float):
        return value
    text = str(value)
    short = text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
