# One image for every process; docker-compose.yml picks the process with its command.
#   docker build -t stoker .                                   torch from PyPI (CUDA on x86-64)
#   docker build -t stoker --build-arg TORCH_INDEX=URL .       another wheel index, e.g. torch's CPU builds
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/stoker
ARG TORCH_INDEX=
RUN /opt/stoker/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} \
      'torch>=2.11' 'transformers>=5.17' 'safetensors>=0.6' 'numpy>=2'
COPY pyproject.toml build_protos.py README.md ./
COPY protos protos
COPY stoker stoker
COPY services services
RUN /opt/stoker/bin/pip install --no-cache-dir '.[all]'

FROM ${BASE}
COPY --from=build /opt/stoker /opt/stoker
ENV PATH=/opt/stoker/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
RUN useradd --create-home --uid 10001 stoker \
 && install -d -o stoker -g stoker /run/stoker /var/lib/stoker /var/log/stoker
USER stoker
WORKDIR /var/lib/stoker
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["services.gateway"]
