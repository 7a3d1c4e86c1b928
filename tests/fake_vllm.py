# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""A small server that speaks the part of vLLM's API which this package uses."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tests.tiny import tiny_tokenizer
from trl_dlr.generation.text import StopStrings


class FakeServer(ThreadingHTTPServer):
    """Speaks the part of vLLM's API that the engine uses. `faults` are played before the next completions."""

    daemon_threads = True

    def __init__(self, main_model, port=0, max_model_len=64, takes_embeds=True, scale=1.0, key=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.main_model = main_model
        self.max_model_len = max_model_len
        self.takes_embeds = takes_embeds
        self.scale = scale  # that it applies to embeddings
        self.key = key
        self.breaks_after = None  # so many tokens of a stream
        self.seconds_per_row = 0.0
        self.faults = []
        self.bodies = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, reply, status=200):
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, message, status=400):
        self.answer({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)

    def has_key(self):
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def do_GET(self):
        if self.path == "/health":
            return self.answer({})
        assert self.path == "/v1/models"
        if not self.has_key():
            return self.answer({"error": "Unauthorized"}, 401)
        adapter = {"id": "adapter", "parent": "main", "max_model_len": None}
        self.answer({"data": [adapter, {"id": "main", "parent": None, "max_model_len": self.server.max_model_len}]})

    def do_POST(self):
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.has_key():
            return self.answer({"error": "Unauthorized"}, 401)
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is not None:
            return fault(self)
        if body["model"] != "main":
            return self.refuse(f"The model `{body['model']}` does not exist.", 404)
        embed = self.server.main_model.get_input_embeddings()
        if "prompt_embeds" in body:
            if not self.server.takes_embeds:
                return self.refuse(
                    "You must set `--enable-prompt-embeds` to input `prompt_embeds`. (parameter=prompt_embeds)"
                )
            rows = [
                self.server.scale * torch.load(io.BytesIO(base64.b64decode(blob))) for blob in body["prompt_embeds"]
            ]
            sizes = {rows[0].size(1), embed.embedding_dim}
            if len(sizes) > 1:
                return self.refuse(
                    f"`prompt_embeds` hidden_size {rows[0].size(1)} does not match the model's hidden_size "
                    f"{embed.embedding_dim}. (parameter=prompt_embeds)"
                )
        else:
            rows = [embed(torch.tensor(ids)) for ids in body["prompt"]]
        rows *= body.get("n", 1)
        if body.get("stream"):
            return self.stream(rows, body)
        with self.server.lock:
            time.sleep(self.server.seconds_per_row * len(rows))
            choices = [self.complete(embeds, body, index) for index, embeds in enumerate(rows)]
        self.answer({"choices": choices[::-1]})

    def stream(self, rows, body):
        """Token by token, each row in turn."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with self.server.lock:
            choices = [self.complete(embeds, body, index) for index, embeds in enumerate(rows)]
        for place in range(max(len(choice["token_ids"]) for choice in choices)):
            for choice in choices:
                if place < len(choice["token_ids"]):
                    is_last = place == len(choice["token_ids"]) - 1
                    piece = {"index": choice["index"], "token_ids": [choice["token_ids"][place]], "text": ""}
                    piece["finish_reason"] = choice["finish_reason"] if is_last else None
                    self.wfile.write(f"data: {json.dumps({'choices': [piece]})}\n\n".encode())
            if self.server.breaks_after == place:
                return  # the connection closes
        self.wfile.write(b"data: [DONE]\n\n")

    @torch.no_grad()
    def complete(self, embeds, body, index):
        embed, stop = self.server.main_model.get_input_embeddings(), body.get("stop_token_ids", [])
        ids, top, texts = [], [], body.get("stop", [])
        stops = StopStrings(texts, tiny_tokenizer()) if texts else None
        while len(ids) < body["max_tokens"] and not (ids and (ids[-1] in stop or (stops and stops.are_in(ids)))):
            logprobs = self.server.main_model(inputs_embeds=embeds[None]).logits[0, -1].log_softmax(-1)
            best = logprobs.topk(body.get("logprobs", 1))
            top.append({f"token_id:{token}": logprobs[token].item() for token in best.indices.tolist()})
            ids.append(best.indices[0].item())
            embeds = torch.cat([embeds, embed(torch.tensor(ids[-1:]))])
        is_over = ids[-1] in stop or (stops is not None and stops.are_in(ids))
        finish_reason = "stop" if is_over else "length"
        return {"index": index, "token_ids": ids, "finish_reason": finish_reason, "logprobs": {"top_logprobs": top}}


@contextmanager
def serve(main_model, **kwargs):
    server = FakeServer(main_model, **kwargs)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
