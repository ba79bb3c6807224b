//! Libraries that are not there, are none, or fail: each in a process of its own, with the emulated driver. What they leave
//! undone, kernels of our own do.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use super::VARIABLE;
use crate::cuda::probe::{DRIVER_VARIABLE, devices};
use crate::cuda::{CudaBackend, testing};
use crate::{Backend, Epilogue, PartOrder, Rows, WeightPart, WeightType};

/// Not a test: says what multiplies, adds a product of 300 features in three slices to ones, and says what multiplies then.
#[test]
#[ignore = "started by the other tests, as a process of its own"]
fn multiply() {
    const ROWS: usize = 512;
    const COLS: usize = 32;
    const FEATURES: usize = 300;
    let mut backend = CudaBackend::new(devices().unwrap()[0].clone()).unwrap();
    println!("\nbefore: {}", backend.describe_products().unwrap());
    // One unit of 128 features a slice.
    backend.large().shrink([128 * COLS * 2, 1 << 20]);
    let weight = |feature: usize, col: usize| ((feature * 7 + col * 3) % 11) as f32 - 5.0;
    let data: Vec<u8> = (0..FEATURES * COLS).flat_map(|i| weight(i / COLS, i % COLS).to_le_bytes()).collect();
    let part = WeightPart { ty: WeightType::F32, rows: FEATURES, cols: COLS, data: &data };
    let bias: Vec<f32> = (0..FEATURES).map(|i| i as f32).collect();
    let weights = backend.load_linear(&[part], PartOrder::Concat, Some(&bias)).unwrap();
    let (x, out) = (backend.alloc_buffer(ROWS, COLS).unwrap(), backend.alloc_buffer(ROWS, FEATURES).unwrap());
    // Rows of one number alone: its square root of the mean is that number, so the norm leaves signs.
    let sign = |row: usize, col: usize| if (row + col).is_multiple_of(3) { -1.0 } else { 1.0 };
    let fill = |row: usize, values: &mut [f32]| {
        values.iter_mut().enumerate().for_each(|(col, x)| *x = 2.0 * sign(row, col));
    };
    backend.for_each_row(x, ROWS, &fill).unwrap();
    backend.for_each_row(out, ROWS, &|_, values| values.fill(1.0)).unwrap();
    let norm = backend.load_vector(&[1.0; COLS]).unwrap();
    let act = backend.alloc_act(ROWS, COLS).unwrap();
    backend.rms_norm(x, Rows::First(ROWS), (norm, 0.0), weights, act).unwrap();
    backend.linear(act, ROWS, weights, Epilogue::Add, out).unwrap();
    let wrong = Mutex::new(0);
    let compare = |row: usize, values: &mut [f32]| {
        for (feature, &got) in values.iter().enumerate() {
            let sum: f32 = (0..COLS).map(|col| weight(feature, col) * sign(row, col)).sum();
            // Whole numbers: every order of the sum gives the same.
            *wrong.lock().unwrap() += usize::from(got != sum + 1.0 + feature as f32);
        }
    };
    backend.for_each_row(out, ROWS, &compare).unwrap();
    let submitted = backend.large().products;
    println!(
        "after: {}, {} wrong, {submitted} by the library",
        backend.describe_products().unwrap(),
        wrong.into_inner().unwrap()
    );
}

/// What multiplies at first, and after a product, with these variables.
fn said(variables: &[(&str, &str)]) -> [String; 2] {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "--test-threads=1", "cuda::cublaslt::tests::multiply"])
        .env(DRIVER_VARIABLE, testing::emulated_driver().unwrap())
        .env_remove(VARIABLE)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    let printed = String::from_utf8(child.stdout).unwrap();
    let line = |name: &str| printed.lines().find_map(|line| line.strip_prefix(name)).expect(&printed).to_owned();
    [line("before: "), line("after: ")]
}

#[test]
fn the_library_beside_a_named_driver_is_used() {
    let [before, after] = said(&[]);
    assert_eq!(before, "cuBLASLt 13.0");
    assert_eq!(after, "cuBLASLt 13.0, 0 wrong, 3 by the library");
}

#[test]
fn without_it_there_is_one_line_of_reason() {
    for (value, expected) in [
        ("off", "own kernels (CUPOLA_CUBLASLT=off)".to_owned()),
        ("/nowhere/libcublasLt.so", "own kernels (cuBLASLt cannot be opened: /nowhere/libcublasLt.so".to_owned()),
        (lacking().to_str().unwrap(), "own kernels (the library named cuBLASLt lacks cublasLtDestroy)".to_owned()),
    ] {
        let [before, after] = said(&[(VARIABLE, value)]);
        assert!(before.starts_with(&expected), "{before}");
        assert_eq!(after, format!("{before}, 0 wrong, 0 by the library"));
    }
    let [before, after] = said(&[("CUPOLA_EMULATOR_CUBLASLT", "create")]);
    assert_eq!(before, "own kernels (cuBLASLt 13.0 failed: cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED)");
    assert_eq!(after, format!("{before}, 0 wrong, 0 by the library"));
}

#[test]
fn what_fails_in_a_product_is_done_by_kernels_of_our_own() {
    for (setting, why, submitted) in [
        ("heuristic", "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED", 0),
        ("0", "cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED", 0),
        ("1", "cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED", 1),
        ("2", "cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED", 2),
    ] {
        let [before, after] = said(&[("CUPOLA_EMULATOR_CUBLASLT", setting)]);
        assert_eq!(before, "cuBLASLt 13.0");
        let expected = format!("own kernels (cuBLASLt failed: {why}), 0 wrong, {submitted} by the library");
        assert_eq!(after, expected, "{setting}");
    }
}

/// A library of one function.
fn lacking() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("cupola-cublaslt-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (source, library) = (folder.join("lacking.c"), folder.join("libcublasLt.so.13"));
    std::fs::write(&source, "int cublasLtCreate(void **handle) { return 1; }").unwrap();
    compile(&source, &library);
    library
}

fn compile(source: &Path, library: &Path) {
    let compiled = Command::new("gcc").args(["-shared", "-fPIC", "-o"]).args([library, source]).output();
    let compiled = compiled.expect("gcc, which linked this test");
    assert!(compiled.status.success(), "{compiled:?}");
}
