# The policy service: robots' actions over websockets, HTTP, LeRobot's gRPC and GR00T's ZeroMQ; no torch. Build at the root of the repository:
#   docker build -f docker/policy.Dockerfile -t recap-policy:0.1.0 .
FROM python:3.12.12-slim-bookworm AS build
ARG INSTALL_OPTIONS=""
ENV UV_NO_CACHE=1
WORKDIR /src
COPY docker/wheels /wheels
RUN python -m pip install --no-cache-dir --disable-pip-version-check --find-links /wheels $INSTALL_OPTIONS uv==0.13.9
RUN uv venv --python "$(command -v python)" /opt/recap
COPY requirements/full.txt requirements/full.txt
COPY README.md pyproject.toml ./
COPY clients/pyproject.toml clients/
COPY clients/recap_client clients/recap_client
COPY recap_model recap_model
COPY services services
RUN uv pip install --compile-bytecode --python /opt/recap/bin/python --find-links /wheels $INSTALL_OPTIONS \
    --constraints requirements/full.txt --build-constraints requirements/full.txt \
    ./clients ".[serve,fronts,triton,trace]"

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/recap /opt/recap
COPY docker/entrypoint.sh docker/healthcheck.py /opt/recap-image/
ENV PATH=/opt/recap/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RECAP_HEALTH_URL=http://127.0.0.1:8000/readyz
USER 10001:10001
EXPOSE 8000 8080 5555
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["sh", "-c", "exec python /opt/recap-image/healthcheck.py $RECAP_HEALTH_URL"]
ENTRYPOINT ["/opt/recap-image/entrypoint.sh", "recap", "serve", "policy", "--host", "0.0.0.0", "--models", "/models"]
CMD ["--log-format", "json"]
