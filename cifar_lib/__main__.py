from cifar_lib.cli import main

raise SystemExit(main())
