#!/usr/bin/env bash
# The contract on the real XRT: Debian sid's libxrt, XDNA driver library and pyxrt in a chroot, over the fake kernel
# driver. Needs root, debootstrap and, the first time, the network (about 500 MB, a minute); the chroot is kept.
# Exits 0 with a line that starts with "test-xrt skipped" where it cannot run, 1 if a check fails.
set -uo pipefail
cd "$(dirname "$0")/../../.."

root=${UNICORN_XRT_CHROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/unicorn_backend/xrt-chroot}
packages=python3,python3-numpy,python3-xrt,libxrt2,libxrt-npu2,libxrt-utils,libxrt-dev,uuid-dev,g++
seconds=150 # that making the chroot may take
known=2.25  # what the checks were written on; sid moves on

skip() {
  echo "test-xrt skipped: $*"
  exit 0
}
discard() {                                               # what an interrupted debootstrap left, without what it mounted
  umount -q "$root"/{proc,sys,dev/pts,dev} 2>/dev/null
  rm -rf --one-file-system "$root"
}
((EUID == 0)) || skip "it needs root, for chroot"
if [[ $(cat "$root/.complete" 2>/dev/null) != "$packages" ]]; then
  command -v debootstrap >/dev/null || skip "debootstrap is missing (apt install debootstrap)"
  mkdir -p "$(dirname "$root")"
  exec 9>"$root.lock"
  flock -w $seconds 9 || skip "another run is making the chroot"
fi
if [[ $(cat "$root/.complete" 2>/dev/null) != "$packages" ]]; then
  discard
  # Debian's mirror as apt has it on this machine; debootstrap knows one where there is none.
  mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 2>/dev/null | sed -n '/^Debian /{s///p;q}')
  timeout -k 10 $seconds debootstrap --variant=minbase --include=$packages sid "$root" $mirror >"$root.log" 2>&1
  case $? in
    0) echo "$packages" >"$root/.complete" ;;
    124 | 137) discard; skip "making the chroot took more than $seconds s" ;;
    *) discard; skip "debootstrap failed (no network?): $(tail -1 "$root.log")" ;;
  esac
fi
exec 9>"$root.lock"
flock -w $seconds 9 || skip "another run uses the chroot"

# Plain files where the kernel would show an NPU of the first generation.
device=0000:c4:00.1
sys=$root/sys/devices/pci0000:00/$device
rm -rf "$root/sys/bus" "$root/work" "$root/artifacts"
mkdir -p "$sys/accel/accel0" "$root"/sys/bus/pci/{devices,drivers/amdxdna} "$root/dev/accel"
mkdir -p "$root"/sys/{module/amdxdna,kernel/iommu_groups/12}
: >"$root/dev/accel/accel0"
for pair in device_type=0 vendor=0x1022 device=0x1502 revision=0x00 vbnv=RyzenAI-npu1 fw_version=1.5.5.391; do
  echo "${pair#*=}" >"$sys/${pair%%=*}"
done
ln -sfn ../../../bus/pci/drivers/amdxdna "$sys/driver"
ln -sfn ../../../kernel/iommu_groups/12 "$sys/iommu_group"
ln -s "../../../devices/pci0000:00/$device" "$root/sys/bus/pci/devices/$device"
ln -s "../../../../devices/pci0000:00/$device" "$root/sys/bus/pci/drivers/amdxdna/$device"

mkdir -p "$root/work/unicorn_backend/runtime" "$root/work/tests/npu" "$root/artifacts"
cp -r kernels "$root/work/"
cp unicorn_backend/{checks,errors}.py "$root/work/unicorn_backend/"
cp -r unicorn_backend/runtime/npu "$root/work/unicorn_backend/runtime/"
cp -r tests/npu/xrt "$root/work/tests/npu/"

version=$(chroot "$root" dpkg-query -W -f '${Version}' libxrt2)
fail() {
  [[ $version == *$known.* ]] || skip "$* on XRT $version, not the $known of these checks: look into it"
  echo "test-xrt FAILED: $*"
  exit 1
}
inside() { chroot "$root" /bin/sh -c "cd /work && $1"; }
inside "g++ -std=c++20 -O1 -shared -fPIC tests/npu/xrt/fake_amdxdna.cpp -o /artifacts/fake.so &&
  python3 kernels/build.py wrapper --out /artifacts && python3 tests/npu/xrt/build_all.py /artifacts" >/dev/null ||
  fail "building in the chroot failed"

failed=0
contract() { # environment, arguments
  echo "--- $2 ${1:+($1)}"
  inside "$1 LD_PRELOAD=/artifacts/fake.so /usr/bin/timeout 120 /usr/bin/python3 tests/npu/xrt/contract.py $2" 2>/dev/null || failed=1
}
for binding in pyxrt wrapper; do
  contract "" "$binding /artifacts"
  contract FAKE_DELAY_US=200000 "$binding /artifacts slow"
  contract FAKE_HANG=1 "$binding /artifacts hang"
  contract FAKE_STATE=6 "$binding /artifacts abort"
  contract "FAKE_AFTER=5 FAKE_HANG=1" "$binding /artifacts midway-hang"
  contract "FAKE_AFTER=5 FAKE_STATE=6" "$binding /artifacts midway-abort"
  contract FAKE_STATE=5 "$binding /artifacts error"
  contract FAKE_MEMORY=8388608 "$binding /artifacts memory"
  contract FAKE_MEMORY=67200000 "$binding /artifacts buffers"
  contract FAKE_CONTEXTS=0 "$binding /artifacts contexts"
  contract FAKE_NO_FIRMWARE=1 "$binding /artifacts firmware"
  for fault in truncated damaged another-k; do contract "" "$binding /artifacts $fault"; done
done
contract "" "machine /artifacts well"
contract FAKE_POWER=4 "machine /artifacts turbo"
contract FAKE_POWER=1 "machine /artifacts powersaver"
contract FAKE_USED=5 "machine /artifacts full"
contract FAKE_NO_FIRMWARE=1 "machine /artifacts firmware"
contract PATH=/nowhere "machine /artifacts no-smi"
contract "ulimit -l 8192;" "machine /artifacts memlock"
((failed)) && fail "the contract is broken"
echo "test-xrt passed: XRT $version, fake driver, no silicon"
