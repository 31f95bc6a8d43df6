#!/bin/bash
# Written by `nibble launch`, which replaces it.
# Runs until the run ends; once more goes on with it.

hosts=(gpu-0)
command='sh -c '"'"'cd "$1" || exit 2
shift
exec 3<&0
"$@" </dev/null 3<&- &
command=$!
{ while read -r line; do :; done <&3; kill "$command"; } >/dev/null 2>&1 &
reader=$!
exec 3<&-
trap "kill $command" TERM INT HUP USR1
while
    wait "$command"
    code=$?
    kill -0 "$command" 2>/dev/null
do :; done
kill "$reader" 2>/dev/null
exit "$code"
'"'"' sh '"'"'/shared/my work'"'"' /shared/venv/bin/python -m nibble train \
    --set '"'"'out="/shared/my work/runs/first"'"'"' \
    --set '"'"'model.name="models/base"'"'"' \
    --set '"'"'data.train="rows of $(hostname) and '"'"'"'"'"'"'"'"'others'"'"'"'"'"'"'"'"'.jsonl"'"'"' \
    --set optim.lr=0.0001 \
    --devices 8'

on_host() {
    ssh -o BatchMode=yes -o ServerAliveInterval=10 -- "$1" "PET_NODE_RANK=$2 $command"
}

pipes=$(mktemp -d) && mkfifo "$pipes/input" "$pipes/codes" || exit 74
exec 7<>"$pipes/input" 8<"$pipes/input" 9<>"$pipes/codes"
rm -r "$pipes"
stop() { exec 7>&-; }
trap stop TERM INT HUP
for rank in "${!hosts[@]}"; do
    { stop; on_host "${hosts[rank]}" "$rank"; echo "$?" >&9; } <&8 &
done

result=0 last=0
for host in "${hosts[@]}"; do
    until read -r -t 2 -u 9 code; do
        [[ $(jobs -pr) ]] || { code=75; break; }
        if ((last && SECONDS > last)); then stop; fi
    done
    # Killed: the run can be continued. 255 is of ssh itself.
    if ((code > 128 && code < 255)); then code=75; fi
    # A reason of its own goes before that of being left alone.
    if ((code != 0 && (result == 0 || result == 75))); then result=$code; fi
    # After one was left alone the others end too, and one of them knows why.
    if ((code == 75)); then last=$((SECONDS + 45)); elif ((code)); then stop; fi
done

exit "$result"
