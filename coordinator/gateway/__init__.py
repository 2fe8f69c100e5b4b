"""The coordinator's HTTP side: the OpenAI API before one or several coordinators, in a process of its own.

fields.py      what each field of a request body means here: honoured, refused, or a label
body.py        the body of a request, read within bounds, and its fields by type
asked.py       a body -> what is asked of the coordinator
answering.py   the answers as they come, several at a time
replies.py     answers -> the shapes of the API (logprobs.py, figures.py are parts of them)
failures.py    errors -> status codes and the API's error objects
app.py         the routes
server.py      settings, the process
"""
