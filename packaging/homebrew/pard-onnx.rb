# For a tap; packaging/registries.py fills in the version and the digest. It has not been installed by Homebrew yet.
class PardOnnx < Formula
  desc "PARD speculative decoding on ONNX Runtime"
  homepage "https://pypi.org/project/pard-onnx/"
  url "https://files.pythonhosted.org/packages/source/p/pard-onnx/pard_onnx-@VERSION@.tar.gz"
  sha256 "@SHA256@"
  license "MIT"

  depends_on "python@3.13"

  on_macos do
    depends_on arch: :arm64 # ONNX Runtime has no current wheels for Intel
    depends_on macos: :sonoma
  end

  def install
    ENV["PARD_ONNX_BUILD_KERNELS"] = "required"
    system Formula["python@3.13"].opt_bin/"python3.13", "-m", "venv", libexec
    system libexec/"bin/python", "-m", "pip", "install", "--no-cache-dir", "#{buildpath}[cpu,serve,guided]"
    bin.install_symlink Dir[libexec/"bin/pard-*"]
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/pard-generate --version")
    system libexec/"bin/python", "-c", "from pard_onnx.runtime import kernels; assert kernels.load() is not None"
  end
end
