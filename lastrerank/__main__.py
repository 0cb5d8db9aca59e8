from lastrerank.cli import main

main()
