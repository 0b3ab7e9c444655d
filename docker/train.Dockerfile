# Training, labelling and export (torch with CUDA from its wheels, LeRobot, ffmpeg). Never used for serving.
#   docker build -f docker/train.Dockerfile -t recap-train:0.1.0 .
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
COPY training training
COPY exporters exporters
RUN uv pip install --python /opt/recap/bin/python --find-links /wheels $INSTALL_OPTIONS \
    --constraints requirements/full.txt --build-constraints requirements/full.txt \
    ./clients ".[train,serve,sim,report,triton]" "lerobot[smolvla,training]==0.6.1"

FROM python:3.12.12-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 libgles2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/recap /opt/recap
COPY docker/entrypoint.sh docker/healthcheck.py /opt/recap-image/
ENV PATH=/opt/recap/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    USER=recap \
    MUJOCO_GL=egl \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
STOPSIGNAL SIGTERM
# a batch job is watched by its exit code and its metrics, not by asking it
HEALTHCHECK NONE
ENTRYPOINT ["/opt/recap-image/entrypoint.sh"]
CMD ["recap", "--help"]
