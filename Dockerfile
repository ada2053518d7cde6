FROM python:3.13-slim

ARG VERSION=1.2.0
LABEL org.opencontainers.image.title="random-event-producer" \
      org.opencontainers.image.description="Sends random user events to a Kafka topic and accounts for every one of them" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT"

# Logs appear at once; nothing is compiled at run time, where the root may be read-only; :: is IPv4 and IPv6.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    METRICS_PORT=8000 \
    METRICS_HOST=::

WORKDIR /app

# Dependencies before the source: a change of the source does not install them again.
# Wheels only: a missing one fails here, instead of asking for a compiler.
COPY requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore --only-binary=:all: \
        --requirement requirements.txt

COPY random_event_producer.py random_churn_producer.py random_faulty_producer.py \
     test_random_producer.py test_random_consumer.py ./
# Readable also when the checkout was not; compiled here, because the user below may not write here.
RUN chmod -R a+rX . && python -m compileall -q .

# By number: Kubernetes can tell that it is not root; the files stay root's, so the process cannot change them.
USER 10001:10001

EXPOSE 8000

# http.client and not urllib: a proxy from the environment must not be asked. localhost: ::1, else 127.0.0.1, since ::
# serves both even where one of them is off. An empty METRICS_PORT serves nothing.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python", "-Ic", "import http.client, os; port, host = map(os.environ.get, ('METRICS_PORT', 'METRICS_HOST')); ask = http.client.HTTPConnection(host if host and host not in ('::', '0.0.0.0') else 'localhost', int(port or 80), timeout=4); port and ask.request('GET', '/healthz'); raise SystemExit(int(bool(port) and ask.getresponse().status != 200))"]

# Exec form: the tool is PID 1 and gets SIGTERM itself.
CMD ["python", "random_event_producer.py"]
