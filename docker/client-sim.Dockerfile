# A simulated robot (MetaWorld's arm) that drives against the services and records. Nothing of the serving side is in it.
#   docker build -f docker/client-sim.Dockerfile -t recap-client-sim:0.1.0 .
FROM python:3.12.12-slim-bookworm AS build
ARG INSTALL_OPTIONS=""
ENV UV_NO_CACHE=1
WORKDIR /src
COPY docker/wheels /wheels
RUN python -m pip install --no-cache-dir --disable-pip-version-check --find-links /wheels $INSTALL_OPTIONS uv==0.13.9
RUN uv venv --python "$(command -v python)" /opt/recap
COPY requirements/full.txt requirements/full.txt
COPY clients/pyproject.toml clients/
COPY clients/recap_client clients/recap_client
# packaging: gymnasium imports it and does not say so
RUN uv pip install --compile-bytecode --python /opt/recap/bin/python --find-links /wheels $INSTALL_OPTIONS \
    --constraints requirements/full.txt --build-constraints requirements/full.txt \
    "./clients[sim,trace]" packaging

FROM python:3.12.12-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 libgles2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/recap /opt/recap
COPY docker/entrypoint.sh docker/healthcheck.py /opt/recap-image/
ENV PATH=/opt/recap/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    MUJOCO_GL=egl \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/recap-image/healthcheck.py", "--fresh", "/rollouts", "180"]
ENTRYPOINT ["/opt/recap-image/entrypoint.sh", "recap-client"]
CMD ["run", "--robot", "metaworld", "--task", "drawer-open", "--url", "ws://policy:8000/act", \
     "--value-url", "ws://critic:8001/value", "--episodes", "10000", "--record", "/rollouts"]
