# docker build -t lastrerank:cpu .
# docker run -p 8000:8000 -v lastrerank-models:/models lastrerank:cpu --model jinaai/jina-reranker-v3 --dtype int8
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ cmake ninja-build && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/lastrerank
ENV PATH=/opt/lastrerank/bin:$PATH
# PyTorch's CPU build: PyPI's brings several gigabytes of CUDA libraries.
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir '/src[serve]'

FROM python:3.12-slim
COPY --from=build /opt/lastrerank /opt/lastrerank
RUN useradd --create-home --uid 1000 lastrerank && mkdir /models && chown lastrerank /models
USER lastrerank
ENV PATH=/opt/lastrerank/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["lastrerank", "serve", "--host", "0.0.0.0", "--port", "8000"]
