//! The `cupola` binary: hands the command line over and returns its exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    cupola::cli::main()
}
