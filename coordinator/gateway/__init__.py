"""The coordinator's HTTP side: the OpenAI API before one or several coordinators, in a process of its own.

fields.py       what each field of a request's body means here: honoured, refused, or a label
body.py         the body, read within bounds, and its fields by type
asked.py        a body -> what is asked of the coordinator (options.py and conversation.py are parts of it)
answering.py    the answers as they come, several at a time
replies.py      answers -> one object or events (choices.py, logprobs.py and figures.py are parts of them)
failures.py     errors -> status codes and the API's error objects
keys.py         who may ask
call.py         one request on its way
tracing.py      its id and its span
app.py          the routes; page.html is one of them
server.py       the process
"""
