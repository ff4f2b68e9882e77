"""The serverless inference API on this machine: Hugging Face's own routes (api-inference-community) around a pipeline.

usage: TASK=image-classification MODEL_ID=org/model python inference_app.py     (prints its address)
"""

from __future__ import annotations

import functools
import os
import socket

import uvicorn
from api_inference_community.routes import pipeline_route, status_ok
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route


@functools.cache
def get_pipeline():
    """The stock pipeline, called by `pipeline_route` with a PIL image and the parameters of the request."""
    from transformers import pipeline

    pipe = pipeline(os.environ["TASK"], os.environ["MODEL_ID"])

    class Pipe:
        def __call__(self, image, **parameters):
            return pipe(image, **{k: v for k, v in parameters.items() if v is not None})

    return Pipe()


async def status(request):
    return JSONResponse({"loaded": True, "state": "Loaded", "compute_type": "cpu"})


everyone = {"allow_origins": ["*"], "allow_headers": ["*"], "allow_methods": ["*"], "expose_headers": ["*"]}
app = Starlette(
    routes=[
        Route("/", status_ok, methods=["GET"]),
        Route("/", pipeline_route, methods=["POST"]),
        Route("/models/{id:path}", pipeline_route, methods=["POST"]),
        Route("/status/{id:path}", status),
    ],
    middleware=[Middleware(CORSMiddleware, **everyone)],
)
app.get_pipeline = get_pipeline

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
