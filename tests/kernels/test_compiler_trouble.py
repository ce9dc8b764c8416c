"""A failed self-test says what to do, and nothing about the user's folders."""

import pytest

from liteattention.kernels.compiler_trouble import LONGEST, explained

GCC = ("subprocess.CalledProcessError: Command '['/usr/bin/gcc', '/tmp/tmpab12/main.c', '-O3', '-o', "
       "'/users/some user/.triton/cache/cuda_utils.so']' returned non-zero exit status 1.")
TCC = (r"subprocess.CalledProcessError: Command '['C:\\Users\\Some User\\ComfyUI\\tcc.exe', "
       r"'\\\\?\\C:\\Users\\Some User\\AppData\\Local\\Temp\\tmp1\\main.c']' returned non-zero exit status 1.")


@pytest.mark.parametrize("said, told", [
    ([], "it said nothing"),
    (["/tmp/tmpab12/main.c:5:10: fatal error: Python.h: No such file or directory", GCC], "Python.h: on Linux install"),
    ([r"tcc: error: file 'C:\Users\Some User\include\Python.h' not found", TCC], "copy the folders include and libs"),
    (["/usr/bin/ld: cannot find -lpython313", GCC], "Python's library"),
    ([TCC], r"paths that begin with \\?\: start ComfyUI from a short path"),
    (["RuntimeError: Failed to find C compiler. Please specify via CC environment variable"], "install gcc"),
    (["AssertionError: libcuda.so cannot found!"], "NVIDIA driver's libcuda"),
    (["ImportError: DLL load failed while importing libtriton"], "Visual C++ Redistributable"),
    ([GCC], "the C compiler that Triton calls has failed"),
    (["a warning", "result differs by 3: d64 bf16 mass pooled even"], "result differs by 3: d64 bf16 mass pooled even"),
    (["OSError: [Errno 28] No space left on device: '/users/some user/.triton/cache'"],
     "OSError: [Errno 28] No space left on device: 'cache'"),
    ([r"PermissionError: C:\Users\User\.triton\cache\x.so"], "PermissionError: x.so"),
])
def test_the_trouble_has_a_remedy_and_no_folder(said, told):
    found = explained(said)
    assert told in found and not any(part in found.lower() for part in ("user\\", "tmpab12", "some user"))


def test_a_long_line_is_cut_where_one_can_see_it():
    assert explained(["x" * 1000]) == "x" * LONGEST + " …"
