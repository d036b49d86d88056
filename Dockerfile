# The router: what decides and serves, without torch. Models run elsewhere (compose.yaml has vLLM for them).
#
#   docker build --tag trim-routing .
#   docker run --publish 8080:8080 --volume ./router:/router:ro --volume ./models.toml:/models.toml:ro trim-routing \
#     --policy /router --models /models.toml --small http://... --large http://... --prm http://...

FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY rollouts rollouts
COPY trim_env trim_env
COPY agents agents
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim AS router
COPY .ci/constraints.txt /constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile --constraint /constraints.txt /wheels/*.whl \
    && useradd --system --uid 10001 --create-home trim
USER 10001
WORKDIR /home/trim
ENV PYTHONUNBUFFERED=1
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/live', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "agents", "serve", "--host", "0.0.0.0", "--port", "8080"]
