#!/usr/bin/env bash
# Prepares Ubuntu 24.04 or 25.04 on a Ryzen AI laptop: compiler, Vulkan driver, groups, limit of locked memory.
# Without --apply it only prints what it would do. Run as the user who will use it; it calls sudo itself.
set -euo pipefail

apply=0
case "${1:-}" in
  "") ;;
  --apply) apply=1 ;;
  -h | --help) sed -n '2,3p' "$0" | cut -c3-; exit 0 ;;
  *) echo "unknown option $1; allowed are --apply and --help" >&2; exit 2 ;;
esac
if ((EUID == 0)); then
  echo "run this as the user who will use the GPU and the NPU, not as root" >&2
  exit 2
fi

did=0
step() { # step WHY COMMAND...: print, and run if --apply
  local why=$1
  shift
  did=1
  echo "# $why"
  printf '  '
  printf '%q ' "$@"
  echo
  ((apply)) && "$@"
  return 0
}

missing=()
for package in g++ python3-venv libvulkan1 mesa-vulkan-drivers; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
((${#missing[@]})) && step "packages: compiler, virtual environments, Vulkan" sudo apt-get install -y "${missing[@]}"

for group in render video; do
  if getent group "$group" >/dev/null && ! id -nG | tr ' ' '\n' | grep -qx "$group"; then
    step "access to the GPU and the NPU (log in again afterwards)" sudo usermod -aG "$group" "$(id -un)"
  fi
done

limits=/etc/security/limits.d/unicorn.conf
if [[ $(ulimit -l) != unlimited && ! -e $limits ]]; then
  step "locked memory for the NPU runtime" sudo sh -c "echo '* - memlock unlimited' > $limits"
fi

thp=/sys/kernel/mm/transparent_hugepage/enabled
if [[ -e $thp ]] && grep -q '\[never\]' "$thp"; then
  step "huge pages for weights, until the next start" sudo sh -c "echo madvise > $thp"
fi

if ((!did)); then
  echo "nothing to do"
elif ((!apply)); then
  echo "nothing was changed; $0 --apply does the above"
fi
