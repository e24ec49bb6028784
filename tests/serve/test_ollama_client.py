"""Scratch."""
from typing import Any
import pytest
pytest.importorskip("starlette")
ollama = pytest.importorskip("ollama")
from served import MESSAGES, Served
def test_x(server: Served) -> None:
    c = ollama.Client(host=server.url)
    print(c.list()); print(c.ps()); print(c.show("demo")); 
    r = c.chat("demo", MESSAGES, options={"num_predict": 8}); print(r)
    for x in c.chat("demo:latest", MESSAGES, options={"num_predict": 8}, stream=True): print(x)
    r = c.generate("demo", "Hello", options={"num_predict": 8}); print(r)
    r = c.generate("demo", "Again", options={"num_predict": 8}, context=r.context); print(r)
    print(server.pair.detokenize(r.context, skip_special_tokens=False))
    print(c.generate("demo", keep_alive=0)); print(c.ps()); print(c.generate("demo")); print(c.ps())
    for b in ({}, {"model":"x"}, {"model":"demo","messages":[{"role":"tool"}],"options":{"num_predict":1}}): print(server.post("/api/chat", b).text)
