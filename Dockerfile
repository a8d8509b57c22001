# A server on port 8000: `docker build -t unicorn . && docker run -p 127.0.0.1:8000:8000 unicorn`
# Another model: `docker run -v ~/.cache/huggingface:/home/unicorn/.cache/huggingface unicorn serve -m ID --host 0.0.0.0`
# Another base image or package index: `--build-arg BASE=...`, `--build-arg TORCH_INDEX=...`
ARG BASE=python:3.12-slim
FROM $BASE AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "torch==2.13.0+cpu" --index-url "$TORCH_INDEX" \
 && pip install --no-cache-dir "scikit-build-core>=0.10" "cmake>=3.24" ninja
COPY . /src
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps -w /wheels /src

FROM $BASE
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch==2.13.0+cpu" --index-url "$TORCH_INDEX"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[serve]" && rm -r /wheels
RUN useradd --create-home unicorn
USER unicorn
EXPOSE 8000
ENTRYPOINT ["unicorn"]
# Inside a container 0.0.0.0 is the container's own network: what may reach it is decided by `docker run -p`.
CMD ["serve", "--host", "0.0.0.0"]
