"""The HTTP routes, a file for each API: what it reads, and how it answers. `broker/http.py` guards them and serves them.

body        a request's body, bounded in bytes and time
refusal     an error in the words of the API that was asked
turns       a turn run and written, in any API's words
answering   a JSON answer that takes a while
following   a background response's events, from any of them on
paging      one page of a list
responses   OpenAI Responses: create, and what is stored
chat        OpenAI Chat Completions: create, and what is stored
messages    Anthropic Messages: create, count, and the probes of its clients
conversations  OpenAI's conversations and their items
models      which models there are
admin       probes, metrics, and what operators may do
"""
