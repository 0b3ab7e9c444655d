# NVIDIA's server, and what a repository of `recap export --backend python` needs beside it.
#   docker build -f docker/triton.Dockerfile -t recap-triton:0.1.0 .
FROM nvcr.io/nvidia/tritonserver:25.10-py3
ARG INSTALL_OPTIONS=""
WORKDIR /src
COPY docker/wheels /wheels
COPY requirements/full.txt requirements/full.txt
RUN python3 -m pip install --no-cache-dir --disable-pip-version-check --break-system-packages --find-links /wheels \
    $INSTALL_OPTIONS --constraint requirements/full.txt numpy onnxruntime
COPY docker/healthcheck.py /opt/recap-image/
ENV HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    RECAP_HEALTH_URL=http://127.0.0.1:8000/v2/health/ready
USER 10001:10001
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["sh", "-c", "exec python3 /opt/recap-image/healthcheck.py $RECAP_HEALTH_URL"]
ENTRYPOINT ["tritonserver", "--model-repository=/models"]
CMD ["--model-control-mode=explicit", "--load-model=*", "--rate-limit=execution_count", "--backend-config=python,shm-default-byte-size=16777216"]
