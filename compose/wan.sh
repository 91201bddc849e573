#!/bin/sh
# Adds the latency of each link to Toxiproxy at the URL given: half of the round trip in each direction.
set -eu
api=$1

delay() {
  for link in "events-$1" "http-$1"; do
    for stream in upstream downstream; do
      curl --silent --show-error --fail-with-body --retry 10 --retry-connrefused "$api/proxies/$link/toxics" --data \
        "{\"name\":\"wan_$stream\",\"type\":\"latency\",\"stream\":\"$stream\",\"attributes\":{\"latency\":$2}}" ||
        # Started again: the toxic is there.
        curl --silent --fail --output /dev/null "$api/proxies/$link/toxics/wan_$stream"
    done
  done
}

delay eu-west 40
delay asia-south 100
